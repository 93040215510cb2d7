"""Looks at this machine and environment: versions, devices, traps, limits, and a sum over two processes.

Says what is missing and what that costs. Exit code 0 = everything needed is there (notes may remain), 2 = a problem.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs will be written (default: runs)")
    parser.add_argument("--no-collective", action="store_true", help="leave out the sum over two processes (seconds)")
    arguments = parser.parse_args(argv)

    from megacm3.doctor import PROBLEM, examine

    problems = 0
    for finding in examine(arguments.folder.resolve(), collective=not arguments.no_collective):
        problems += finding.state == PROBLEM
        print(f"{finding.state:8}{finding.name:20}{finding.text}", flush=True)
    print(f"{problems} problems" if problems else "everything needed is there")
    return 2 if problems else 0


if __name__ == "__main__":
    run(main)
