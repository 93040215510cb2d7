"""Search config keys: run the trials that a sweep's file asks for, here or on Slurm, and print the best."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Run the same command again to continue; the keys stand in megacm3/training/sweep.py.",
    )
    add = parser.add_argument
    add("sweep", metavar="YAML", help="such as examples/configs/sweep_sft_cm3leon_7b.yaml")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="of the sweep's file: out=runs/other parallel=2 executor=slurm",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Search, print the best."""
    given = _parser().parse_args(arguments)

    from megacm3.errors import ConfigError
    from megacm3.resolve import parse_overrides

    try:
        from megacm3.training.sweep import load_sweep, run_sweep
    except ModuleNotFoundError as fault:
        if fault.name != "optuna":
            raise
        raise ConfigError("sweeps need Optuna, which is not installed; pip install optuna") from fault

    sweep = load_sweep(given.sweep, parse_overrides(given.overrides))
    found = run_sweep(sweep, lambda line: print(line, flush=True))
    print(f"{found.done} trials done, {len(found.failed)} failed, in {sweep.out}")
    for number, why in found.failed:
        print(f"failed: trial {number}: {why}")
    if found.best is None:
        raise ConfigError(f"no trial of {sweep.out} gave a value; their trial.log files say why")
    best = " ".join(f"{key}={value}" for key, value in found.best.params.items())
    print(f"best: trial {found.best.number}, {sweep.value} = {found.best.value:.6g}: {best}")
    return 0


if __name__ == "__main__":
    run(main)
