"""Measure an exported model: perplexity over a token store, or the quickstart's fidelity figure over pictures."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.errors import ConfigError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="HF_DIR", help="folder made by convert_checkpoint.py to-hf")
    add("--task", required=True, help="perplexity or fidelity")
    add("--input", required=True, nargs="+", help="perplexity: a store; fidelity: the training pictures (tars, ...)")
    add("--output", metavar="JSON", help="also write the result to this file")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    add("--limit", type=int, help="perplexity: first documents only")
    add("--count", type=int, default=32, help="fidelity: captions drawn (default %(default)s)")
    add("--seed", type=int, default=0, help="fidelity: of captions and samples (default %(default)s)")
    add("--guidance", type=float, nargs="+", default=[3.0], help="fidelity: each value is measured (default 3)")
    add("--temperature", type=float, nargs="+", default=[1.0], help="fidelity: each value (default 1)")
    add("--top-p", type=float, nargs="+", default=[0.8], help="fidelity: each value (default 0.8)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print and perhaps write the result."""
    given = _parser().parse_args(arguments)
    tasks = {"perplexity": _perplexity, "fidelity": _fidelity}
    if given.task not in tasks:
        raise ConfigError(f"--task {given.task} is unknown; expected one of {', '.join(tasks)}")

    from megacm3.files import write_json
    from megacm3.inference.api import Generator

    generator = Generator.load(given.model, given.device)
    result = {"task": given.task, "model": given.model, "input": given.input}
    result |= tasks[given.task](generator, given)
    if given.output:
        write_json(given.output, result)
    return 0


def _perplexity(generator, given: argparse.Namespace) -> dict:
    from megacm3.command import progress
    from megacm3.data.store import Store
    from megacm3.evaluation.perplexity import check_store, perplexity

    if len(given.input) != 1:
        raise ConfigError(f"--task perplexity measures one store; found {len(given.input)} in --input")
    store = Store.open(given.input[0])
    check_store(generator, store)
    count = len(store) if given.limit is None else min(given.limit, len(store))
    documents = (store.document(i) for i in progress(range(count), total=count, unit="doc", description="perplexity"))
    result = perplexity(generator, documents)
    print(json.dumps(result, indent=1))
    return result


def _fidelity(generator, given: argparse.Namespace) -> dict:
    from itertools import product

    from megacm3.evaluation.fidelity import Settings, measure
    from megacm3.evaluation.pictures import read_gallery

    gallery = read_gallery(given.input, generator.image_size)
    measured = []
    for guidance, temperature, top_p in product(given.guidance, given.temperature, given.top_p):
        settings = Settings(given.count, given.seed, guidance, temperature, top_p)
        found = measure(generator, gallery, settings)
        measured.append(found.to_json(gallery))
        print(
            f"fidelity {found.fidelity:.1%} of {given.count} captions, tokenizer alone {found.reconstruction:.1%} "
            f"(guidance {guidance:g}, temperature {temperature:g}, top-p {top_p:g}, seed {given.seed}, "
            f"{found.pictures} pictures)",
            flush=True,
        )
    return measured[0] if len(measured) == 1 else {"measured": measured}


if __name__ == "__main__":
    run(main)
