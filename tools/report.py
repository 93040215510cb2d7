"""Show what a whole run made: report.html, samples.png and the fidelity figure, in the run's folder."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="a folder like runs/quickstart, with hf/ and train/ at least")
    add("--input", required=True, nargs="+", metavar="GLOB", help="the training pictures")
    add("--heldout", nargs="+", default=[], metavar="GLOB", help="the pictures kept out of training")
    add("--count", type=int, default=32, help="captions of the fidelity figure (default %(default)s)")
    add("--seed", type=int, default=0, help="of captions and samples (default %(default)s)")
    add("--guidance", type=float, default=3.0, help="classifier-free guidance scale (default %(default)s)")
    add("--temperature", type=float, default=1.0, help="of pictures (default %(default)s)")
    add("--top-p", type=float, default=0.8, help="of pictures (default %(default)s)")
    add("--top-k", type=int, default=0, help="of pictures (default %(default)s, off)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse, write, say where it is."""
    given = _parser().parse_args(arguments)

    from megacm3.evaluation.fidelity import Settings
    from megacm3.evaluation.report import Places, quickstart_report

    settings = Settings(given.count, given.seed, given.guidance, given.temperature, given.top_p, given.top_k)
    found = quickstart_report(Places(Path(given.run), given.input, given.heldout, settings), given.device)
    print(
        f"fidelity: {found.fidelity:.0%} of {given.count} generated pictures, {found.reconstruction:.0%} of the image "
        f"tokenizer's reconstructions (guidance {given.guidance:g}, temperature {given.temperature:g}, "
        f"top-p {given.top_p:g}, seed {given.seed})"
    )
    print(f"pictures: {Path(given.run) / 'samples.png'}")
    print(f"report:   {Path(given.run) / 'report.html'}")
    return 0


if __name__ == "__main__":
    run(main)
