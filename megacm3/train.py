"""The trainer: `deepspeed --num_gpus N --module megacm3.train CONFIG.yaml [key=value ...]` (torchrun works too)."""

import argparse
import importlib.util
import io
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megacm3.command import run as run_command
from megacm3.config import Config
from megacm3.errors import ConfigError, Megacm3Error, PeerLost
from megacm3.resolve import load_config


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megacm3.train",
        description="Pretrain or fine-tune a model of the CM3Leon / Chameleon family.",
        epilog="Keys are listed with their meaning in megacm3/config.py; any can be given as key=value.",
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=100")
    parser.add_argument(
        "--dry-run",
        type=int,
        metavar="RANKS",
        help="say what would start on so many ranks, and leave",
    )
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def environment(local_rank: int | None) -> int:
    """Fill in what a launcher would set, for a run of one process; return the world size.

    Raises ConfigError where only a part of it is set.
    """
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']} is set, but {', '.join(missing)} is not; start the trainer with "
            "deepspeed or torchrun, or unset WORLD_SIZE for a run of one process"
        )
    return int(os.environ["WORLD_SIZE"])


def check_launch(config: Config, world: int) -> None:
    """All that can be known before any process group exists. Raises ConfigError."""
    from megacm3.parallel.context import check_world
    from megacm3.parallel.deepspeed_json import fill_deepspeed_json
    from megacm3.training.agreement import check_override

    if not config.train.out:
        raise ConfigError("train.out is empty; give the run's folder, for example train.out=runs/first")
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"log.wandb = '{config.log.wandb}', but wandb is not installed; pip install wandb, or set log.wandb=''"
        )
    check_override(config)
    fill_deepspeed_json(config, check_world(config, world))


def main(argv: list[str] | None = None) -> int:
    """Parse, check, build, train."""
    arguments = _arguments(argv)
    if arguments.dry_run is not None:
        return _dry_run(load_config(arguments.config, arguments.overrides), arguments.dry_run)
    world = environment(arguments.local_rank)
    with _one_voice():
        config = load_config(arguments.config, arguments.overrides)

        from megacm3.model.kernels import set_environment
        from megacm3.parallel.cpu import choose_device, prepare
        from megacm3.planning.room import check_room
        from megacm3.training.start import check_init

        set_environment(config)
        device = choose_device(config.train.device)
        prepare(device)
        check_launch(config, world)
        check_init(config)
        check_room(config, world, device)
    return _train(config, device)


def _dry_run(config: Config, ranks: int) -> int:
    from megacm3.training.dry_run import describe

    check_launch(config, ranks)
    print(describe(config, ranks))
    return 0


@contextmanager
def _one_voice() -> Iterator[None]:
    """Until the ranks meet, all have the same errors: rank 0 prints them. Another rank prints its own after a moment,
    in which a launcher ends it where rank 0 had the error too."""
    spoken = sys.stderr
    try:
        if os.environ["RANK"] != "0":
            sys.stderr = io.StringIO()
        yield
    except Megacm3Error:
        sys.stderr = spoken
        if os.environ["RANK"] != "0":
            time.sleep(1.0 if int(os.environ["RANK"]) < 64 else 2.0)
        raise
    finally:
        sys.stderr = spoken


def _meet(config: Config, device: Any) -> tuple[Any, Any]:
    """Context and watchdog, once all ranks are there. Collective.

    Raises ConfigError where they cannot meet at that place, PeerLost where some did not come.
    """
    import deepspeed
    import torch

    from megacm3.parallel.context import build_context
    from megacm3.training.watchdog import Watchdog, is_peers_fault

    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo")
        context = build_context(config, device)
        return context, Watchdog(config, context)
    except RuntimeError as fault:
        if not is_peers_fault(fault):
            raise
        why = str(fault).splitlines()[0]
        if isinstance(fault, torch.distributed.DistNetworkError) and "timed out" not in why:
            raise ConfigError(
                f"the ranks cannot meet at {where}: {why}; give the launcher another --master_port"
            ) from fault
        ranks = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
        raise PeerLost(f"{ranks} did not meet all others at {where} (rank 0's machine): {why}") from fault


def _train(config: Config, device: Any) -> int:
    import deepspeed
    import torch

    from megacm3.training.agreement import check_ranks_agree
    from megacm3.training.loop import train
    from megacm3.training.run import build_run, claim_folder

    deepspeed.utils.logger.setLevel(logging.WARNING)
    log = logging.getLogger(__name__)
    context, watchdog = _meet(config, device)
    if context.rank == 0:
        log.info("%s", context)
    lock = None
    try:
        check_ranks_agree(config, context)
        lock = claim_folder(Path(config.train.out)) if context.rank == 0 else None
        run = build_run(config, context, watchdog)
        run.resume()
        train(run)
        torch.distributed.barrier(group=context.control_group)
        watchdog.close()
    except BaseException as error:
        end = watchdog.leave(error)
        raise end from (error if end is not error else None)
    finally:
        if lock:
            lock.release()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    run_command(main)
