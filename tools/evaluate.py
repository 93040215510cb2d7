"""Measure an exported model.

perplexity over a token store; fidelity, the quickstart's figure over pictures; retrieval: loss per image token of a
held-out store with no, retrieved and random documents in front; fid and clip: pictures drawn for captions, by a local
network; recall: the network alone; caption: CIDEr, BLEU, ROUGE-L; vqa: VQAv2's accuracy.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.errors import ConfigError

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
    tasks = {"perplexity": _perplexity, "fidelity": _fidelity, "retrieval": _retrieval}
    if given.task not in _TASKS:
        raise ConfigError(f"--task {given.task} is unknown; expected one of {', '.join(_TASKS)}")

    from megacm3.files import write_json
    from megacm3.inference.api import Generator

    generator = Generator.load(given.model, given.device)
    result = {"task": given.task, "model": given.model, "input": given.input}
    result |= tasks.get(given.task, _other)(generator, given)
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


def _retrieval(generator, given: argparse.Namespace) -> dict:
    from megacm3.data.store import Store
    from megacm3.evaluation import retrieval_gain
    from megacm3.evaluation.page import write_page
    from megacm3.inference.api import Generator
    from megacm3.retrieval.bank import MemoryBank
    from megacm3.retrieval.neighbours import NeighbourTable

    if len(given.input) != 1 or not given.neighbours or not given.store:
        raise ConfigError("--task retrieval needs one held-out store as --input, --neighbours and --store")
    models = [generator, *(Generator.load(folder, given.device) for folder in given.more_models)]
    baseline = [Generator.load(folder, given.device) for folder in given.baseline]
    stores = Store.open(given.input[0]), Store.open(given.store)
    held_out = retrieval_gain.HeldOut(*stores, NeighbourTable.open(given.neighbours), seed=given.seed)
    result = retrieval_gain.gain(models, held_out, baseline, given.limit)
    if given.bank:
        captions = [text for text in stores[0].metadata(["caption"])["caption"].to_pylist() if text]
        result["latency_ms"] = retrieval_gain.latency(MemoryBank.open(given.bank), captions)
        for name, waits in result["latency_ms"].items():
            print(f"{name}: p50 {waits['p50']:.2f} ms, p99 {waits['p99']:.2f} ms a prompt")
    made = retrieval_gain.section(result)
    for row in retrieval_gain.table(result):
        print(" | ".join(row))
    for line in retrieval_gain.words(result):
        print(line)
    if given.report:
        write_page(given.report, "Retrieval", "Made by tools/evaluate.py --task retrieval.", [], [made])
    return result


def _other(generator, given: argparse.Namespace) -> dict:
    from megacm3.evaluation import tasks
    from megacm3.evaluation.distances import compared, recall
    from megacm3.files import read_json
    from megacm3.retrieval.encoder import Encoder

    if given.task in ("fid", "clip", "recall") and not given.encoder:
        raise ConfigError(f"--task {given.task} needs --encoder: a local CLIP's folder, such as the bank's encoder")
    if given.task == "vqa":
        found = tasks.vqa_task(generator, given.input, given.images, given.limit)
    else:
        gallery = tasks.gallery_of(given.input, generator, given.limit)
        drawing = {name: getattr(given, name)[0] for name in ("guidance", "temperature", "top_p")} | {
            "seed": given.seed
        }
        if given.task == "caption":
            found = tasks.caption_task(generator, gallery)
        elif given.task == "recall":
            encoder = Encoder.load(given.encoder)
            found = tasks.Measured(recall(gallery.pixels, gallery.captions, encoder, (1, 5, 10)))
        else:
            task = tasks.fid_task if given.task == "fid" else tasks.clip_task
            found = task(generator, gallery, Encoder.load(given.encoder), **drawing)
    print(json.dumps(found.figures, indent=1))
    if given.against:
        for name, (other, own) in compared(read_json(given.against), found.figures).items():
            print(f"{name}: {own:.4g} here, {other:.4g} in {given.against}")
    if given.report:
        found.write_report(given.report, f"Evaluation: {given.task}")
    return found.figures


if __name__ == "__main__":
    run(main)
