"""The trainer inside a rank of `run_distributed`: a whole run, with its end as a value instead of an exit code."""

import json
import os
from pathlib import Path
from typing import Any


def trained(config: str, out: str, overrides: list[str], fault: str = "", save_limit: int = 0) -> dict[str, Any]:
    """Train from a config file into `out`; what the rank says: step, error, exit code, guards' state.

    save_limit: bytes of the longest file that rank 1 may write, 0 = any.
    """
    os.environ["MEGACM3_FAULT"] = fault
    import logging
    import resource

    import deepspeed

    from megacm3.errors import Megacm3Error
    from megacm3.parallel.context import build_context
    from megacm3.parallel.cpu import choose_device, prepare
    from megacm3.resolve import load_config
    from megacm3.training.loop import train
    from megacm3.training.run import build_run
    from megacm3.training.watchdog import Watchdog

    prepare(choose_device("cpu"))
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.init_distributed("gloo")
    settings = load_config(config, [f"train.out={out}", *overrides])
    context = build_context(settings, choose_device("cpu"))
    run = build_run(settings, context, Watchdog(settings, context))
    if save_limit and context.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (save_limit, resource.RLIM_INFINITY))
    error, code = "", 0
    try:
        run.resume()
        train(run)
    except Megacm3Error as fault_met:
        error, code = str(fault_met), fault_met.exit_code
    return {"step": run.step, "error": error, "code": code, "guards": run.guards.state()}


def curve(out: Path) -> dict[int, tuple[float, float, str]]:
    """Step -> loss, gradient norm and samples, of a run's log."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"], line["samples"]) for line in lines}
