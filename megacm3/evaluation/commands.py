"""What tools/evaluate.py does for each of its tasks: measure, print, return the result. Imports nothing heavy."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from megacm3.errors import ConfigError

if TYPE_CHECKING:
    from megacm3.inference.api import Generator


def perplexity_command(generator: "Generator", given: argparse.Namespace) -> dict[str, Any]:
    """Loss, perplexity and bits per pixel over one store. Raises ConfigError for several."""
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


def fidelity_command(generator: "Generator", given: argparse.Namespace) -> dict[str, Any]:
    """The quickstart's figure, for every combination of guidance, temperature and top-p."""
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


def retrieval_command(generator: "Generator", given: argparse.Namespace) -> dict[str, Any]:
    """Loss of a held-out store behind retrieved and random documents. Raises ConfigError for a missing flag."""
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


def other_command(generator: "Generator", given: argparse.Namespace) -> dict[str, Any]:
    """fid, clip, recall, caption and vqa. Raises ConfigError for a missing --encoder."""
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
