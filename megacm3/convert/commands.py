"""The four conversions of tools/convert_checkpoint.py: checks, progress, gate, and the lines that they print."""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megacm3.checkpoint.boxes import whole
from megacm3.checkpoint.pieces import PARAM
from megacm3.checkpoint.reader import Checkpoint
from megacm3.checkpoint.reshard import config_of, find_step, reshard
from megacm3.convert.adapter import write_adapter
from megacm3.convert.export_weights import weight_bytes
from megacm3.convert.extend import Extended
from megacm3.convert.from_hf import from_hf, opened
from megacm3.convert.to_hf import Export, to_hf
from megacm3.convert.verify import Verdict, compare


@contextmanager
def _bytes_written(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr of bytes written."""
    import sys

    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    bar = tqdm(
        total=total, unit="B", unit_scale=True, unit_divisor=1000, mininterval=10.0 if quiet else 0.2, file=sys.stderr
    )
    with bar:
        yield bar.update


def _told(verdict: Verdict) -> str:
    what = " and ".join(verdict.batches)
    return f"logits equal the trainer's: largest difference {verdict.largest:.1e} over {verdict.tokens} {what} tokens"


def to_hf_command(given: argparse.Namespace) -> list[str]:
    """Export and compare."""
    if given.adapter:
        path, count = write_adapter(given.checkpoint, given.output, given.adapter)
        return [f"{path}: adapters of {count} matrices over {given.adapter}"]
    begun = time.monotonic()
    tokenizers = {"text_tokenizer": given.text_tokenizer, "image_tokenizer": given.image_tokenizer}
    export = Export.of(given.checkpoint, given.dtype, tokenizers)
    verdicts: list[Verdict] = []

    def gate(folder: Path) -> None:
        if not given.no_gate:
            verdicts.append(
                compare(export.checkpoint, export.config, folder, kind=export.source_kind, dtype=export.dtype)
            )

    total = weight_bytes(export)
    with _bytes_written(total) as done:
        path = to_hf(
            export,
            given.output,
            shard_bytes=int(given.max_shard_size * 1e9),
            replace=given.overwrite,
            gate=gate,
            done=done,
        )
    gate_line = _told(verdicts[0]) if verdicts else "the logits were not compared (--no-gate)"
    step = f"step {export.checkpoint.step} of {export.checkpoint.folder}"
    return [f"{path}: {step}, {total / 1e6:.1f} MB of weights in {time.monotonic() - begun:.1f} s", gate_line]


def from_hf_command(given: argparse.Namespace) -> list[str]:
    """Import and compare."""
    begun = time.monotonic()
    verdicts: list[Verdict] = []

    options = {"trust_pickle": given.trust_pickle, "extend_vocab": given.extend_vocab}
    with opened(given.model, given.output, **options) as source:
        original = source.source if isinstance(source, Extended) else source

        def gate(folder: Path) -> None:
            if not given.no_gate:
                checkpoint = Checkpoint(folder)
                verdicts.append(compare(checkpoint, config_of(checkpoint.config, 1, 1), source.folder, original))

        total = sum(dtype.itemsize * whole(shape).numel for _, dtype, shape in source.tensors.values())
        with _bytes_written(total) as done:
            path = from_hf(source, given.output, given.tensor, given.pipeline, gate=gate, done=done)
    gate_line = _told(verdicts[0]) if verdicts else "the logits were not compared (--no-gate)"
    layout = f"tensor {given.tensor} x pipeline {given.pipeline}"
    return [f"{path}: {layout}, in {time.monotonic() - begun:.1f} s", gate_line]


def reshard_command(given: argparse.Namespace) -> list[str]:
    """Change the layout."""
    begun = time.monotonic()
    source = Checkpoint(find_step(given.checkpoint))
    with _bytes_written(sum(entry["bytes"] for entry in source.manifest.files.values())) as done:
        path = reshard(source.folder, given.output, given.tensor, given.pipeline, done)
    after = f"tensor {given.tensor} x pipeline {given.pipeline}, in {time.monotonic() - begun:.1f} s"
    return [f"{path}: step {source.step}, {_layout(source)} -> {after}"]


def _layout(checkpoint: Checkpoint) -> str:
    layout = checkpoint.layout
    degrees = " x ".join(f"{name} {layout[name]}" for name in ("tensor", "pipeline", "data"))
    return f"{degrees}, ZeRO {layout['zero']}"


def inspect_command(given: argparse.Namespace) -> list[str]:
    """What a checkpoint holds."""
    checkpoint = Checkpoint(find_step(given.checkpoint), verify="sha256" if given.verify else "size")
    checkpoint.check_coverage()
    model, checked = checkpoint.config["model"], "hashes" if given.verify else "sizes"
    size = sum(entry["bytes"] for entry in checkpoint.manifest.files.values())
    count = sum(whole(shape).numel for shape in checkpoint.shapes.values())
    kinds = ", ".join(f"{kind} {str(dtype).removeprefix('torch.')}" for kind, dtype in checkpoint.kinds.items())
    lines = [
        f"{checkpoint.folder}",
        f"step         {checkpoint.step} (optimizer {checkpoint.optimizer_step})",
        f"model        {model['preset'] or model['family']}: {model['layers']} layers x {model['hidden_size']}, "
        f"vocabulary {model['vocab_size']}, {count:,} parameters in {len(checkpoint.shapes)} tensors",
        f"written by   {_layout(checkpoint)}",
        f"values       {kinds}",
        f"files        {len(checkpoint.manifest.files)}, {size / 1e6:.1f} MB, {checked} right",
        f"fingerprint  {checkpoint.manifest.fingerprint}",
    ]
    return lines + [
        f"  {name:40} {list(shape)} {_boxes(checkpoint, name)}" for name, shape in checkpoint.shapes.items()
    ]


def _boxes(checkpoint: Checkpoint, name: str) -> str:
    count = len(checkpoint.boxes(PARAM, name))
    return f"in {count} boxes" if count > 1 else "whole"
