"""Kills a small training run again and again at random moments, starts it again, and compares what it ends with.

Needs no GPU. Can be stopped and run again: it goes on. Exit code 0 = every bit is that of a run that was never killed.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run


def main(argv: list[str] | None = None) -> int:
    """Parse, soak, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/soak"), metavar="DIR", help="default: runs/soak")
    parser.add_argument("--kills", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="leave after so long, to be run again (exit code 75)"
    )
    given = parser.parse_args(argv)

    from megacm3.errors import Stopped
    from megacm3.training.soak import Soak, table

    started = time.monotonic()
    soak = Soak(given.output.resolve(), given.ranks, given.kills, given.seed)
    soak.prepare()
    soak.unbroken()
    while len(soak.done) < soak.kills:
        if given.minutes and time.monotonic() - started > 60 * given.minutes:
            raise Stopped(f"{len(soak.done)} of {soak.kills} kills done; run the same command again")
        kill = soak.next_kill()
        print(
            f"{len(soak.done):3}  {kill.kind:20} at step {kill.step:4}  exit codes {kill.codes}  gone after "
            f"{kill.seconds:.1f} s  {kill.lost} steps to do again",
            flush=True,
        )
    found = soak.finish()
    print(table(soak.done))
    print(
        f"after {soak.kills} kills all {found['tensors']} tensors of step {found['steps']} (parameters and moments) "
        "and the whole curve are bitwise those of the unbroken run"
    )
    return 0


if __name__ == "__main__":
    run(main)
