"""Write a report of one page: of a training run (--train), or of the quickstart's whole folder (--run)."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.errors import ConfigError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--train", metavar="DIR", help="a trainer's `out`: writes DIR/report.html with its curves")
    add("--run", metavar="DIR", help="a folder like runs/quickstart: writes report.html, samples.png, fidelity.json")
    add("--input", nargs="+", metavar="GLOB", help="with --run: the training pictures")
    add("--heldout", nargs="+", default=[], metavar="GLOB", help="with --run: the pictures kept out of training")
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
    if (given.train is None) == (given.run is None):
        raise ConfigError("expected either --train DIR or --run DIR")
    if given.run and not given.input:
        raise ConfigError("--run needs the training pictures; expected --input GLOB")

    from megacm3.evaluation.fidelity import Settings
    from megacm3.evaluation.report import Places, quickstart_report, train_report

    if given.train:
        print(train_report(Path(given.train)))
        return 0
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
