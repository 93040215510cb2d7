"""Measure an exported model.

perplexity over a token store; fidelity, the quickstart's figure over pictures; retrieval: loss per image token of a
held-out store with no, retrieved and random documents in front; fid and clip: pictures drawn for captions, by a local
network; recall: the network alone; caption: CIDEr, BLEU, ROUGE-L; vqa: VQAv2's accuracy.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.errors import ConfigError
from megacm3.files import check_output

_TASKS = ("perplexity", "fidelity", "retrieval", "fid", "clip", "recall", "caption", "vqa")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="HF_DIR", help="folder made by convert_checkpoint.py to-hf")
    add("--task", required=True, help=", ".join(_TASKS))
    add("--input", required=True, nargs="+", help="perplexity, retrieval: a store; vqa: questions; else pictures")
    add("--output", metavar="JSON", help="also write the result to this file")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    add("--limit", type=int, help="all but fidelity: first documents only")
    add("--count", type=int, default=32, help="fidelity: captions drawn (default %(default)s)")
    add("--seed", type=int, default=0, help="of captions and samples drawn (default %(default)s)")
    add("--encoder", metavar="DIR", help="fid, clip, recall: the network, a CLIP's folder such as the bank's encoder")
    add("--images", default="", metavar="DIR", help="vqa: the release's pictures")
    add("--against", metavar="JSON", help="fid, clip, recall: compare with an earlier --output of the same protocol")
    add("--report", metavar="HTML", help="all but perplexity and fidelity: also write a page")
    add("--guidance", type=float, nargs="+", default=[3.0], help="fidelity: each value is measured (default 3)")
    add("--temperature", type=float, nargs="+", default=[1.0], help="fidelity: each value (default 1)")
    add("--top-p", type=float, nargs="+", default=[0.8], help="fidelity: each value (default 0.8)")
    _add_retrieval(parser.add_argument_group("retrieval"))
    return parser


def _add_retrieval(group: Any) -> None:
    add = group.add_argument
    add("--more-models", nargs="+", default=[], metavar="HF_DIR", help="the same recipe with other seeds")
    add("--baseline", nargs="+", default=[], metavar="HF_DIR", help="the recipe without retrieval, seed by seed")
    add("--neighbours", metavar="DIR", help="of the held-out store (tools/find_neighbours.py --queries)")
    add("--store", metavar="DIR", help="the training store, whose documents stand in front")
    add("--bank", metavar="DIR", help="the training bank: also time its search")


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print and perhaps write the result."""
    given = _parser().parse_args(arguments)
    for flag in ("output", "report"):
        if getattr(given, flag) is not None:
            check_output(getattr(given, flag), f"--{flag}", file=True)
    if given.task not in _TASKS:
        raise ConfigError(f"--task {given.task} is unknown; expected one of {', '.join(_TASKS)}")

    if given.limit is not None and given.limit < 1:
        raise ConfigError(f"--limit {given.limit}; expected 1 or more documents, or leave it out for all")

    from megacm3.evaluation import commands
    from megacm3.files import write_json
    from megacm3.inference.api import Generator

    tasks = {
        "perplexity": commands.perplexity_command,
        "fidelity": commands.fidelity_command,
        "retrieval": commands.retrieval_command,
    }
    generator = Generator.load(given.model, given.device)
    result = {"task": given.task, "model": given.model, "input": given.input}
    result |= tasks.get(given.task, commands.other_command)(generator, given)
    if given.output:
        write_json(given.output, result)
    return 0


if __name__ == "__main__":
    run(main)
