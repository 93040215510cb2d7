"""The image tokenizer's whole job: find pictures, prepare them once, train, and do nothing when it is done already."""

import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megacm3.data.images import ImageLimits
from megacm3.data.sources import find_shards, identify
from megacm3.errors import DataError
from megacm3.files import read_json, read_manifest, sha256_json
from megacm3.tokenizers.image import KIND
from megacm3.tokenizers.image_config import ImageTokenizerConfig
from megacm3.tokenizers.pictures import Pictures, open_pictures, prepare_pictures


def run_job(
    config: ImageTokenizerConfig,
    inputs: list[str],
    output: str | Path,
    *,
    held_out: list[str] | None = None,
    min_side: int = 32,
    max_reject_rate: float = 0.05,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train the tokenizer `output`, continue, or find it done (`finished_before` in the report).

    Raises DataError for bad inputs or when `output` was made from other inputs or settings, unless `overwrite`.
    """
    shards = find_shards(inputs)
    pictures_of = {"pictures": identify(shards)}
    shown = asdict(config)
    # Where and with how many threads it runs does not make another tokenizer.
    for name in ("device", "threads", "save_every"):
        shown["train"].pop(name)
    job = sha256_json({"inputs": pictures_of, "config": shown, "min_side": min_side})
    output = Path(output)
    if _finished(output, job, overwrite):
        return read_json(output / "report.json") | {"finished_before": True}
    work = Path(str(output).rstrip("/") + ".work")
    # Pictures that other limits let through are other pictures.
    prepared = sha256_json(pictures_of | {"min_side": min_side})
    rank = int(os.environ.get("RANK", 0))
    limits, size, most = ImageLimits(min_side=min_side), config.network.image_size, config.train.max_pictures
    if rank == 0:
        if overwrite and (work / "state.pt").is_file():
            _drop_other_state(work, job)
        options: dict[str, Any] = {"limits": limits, "max_reject_rate": max_reject_rate}
        options["threads"] = max(1, len(os.sched_getaffinity(0)))
        pictures = prepare_pictures(shards, size, work / "training", job=prepared, most=most, **options)
        extra = None
        if held_out:
            others = find_shards(held_out)
            held_out_job = sha256_json({"pictures": identify(others), "min_side": min_side})
            extra = prepare_pictures(others, size, work / "held_out", job=held_out_job, most=most, **options)
    else:
        pictures, extra = _wait_for(work / "training", prepared, size, most), None

    from megacm3.tokenizers.train_image import train_image_tokenizer

    report = train_image_tokenizer(
        config, pictures, output, job=job, inputs=pictures_of, held_out=extra, replace=overwrite
    )
    if rank == 0:
        shutil.rmtree(work, ignore_errors=True)
    return report


def _finished(output: Path, job: str, overwrite: bool) -> bool:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    manifest = read_manifest(output, KIND, verify="sha256")
    if manifest.settings.get("job") == job:
        return True
    if overwrite:
        return False
    raise DataError(
        f"{output} exists and was made from other pictures or settings; "
        f"give another --output, or --overwrite to replace it"
    )


def _drop_other_state(work: Path, job: str) -> None:
    import torch

    if torch.load(work / "state.pt", map_location="cpu", weights_only=True)["job"] != job:
        (work / "state.pt").unlink()


def _wait_for(folder: Path, job: str, size: int, most: int) -> Pictures:
    # Ranks other than 0 take what rank 0 prepares; they share its file system.
    while True:
        pictures = open_pictures(folder, job=job, size=size, most=most)
        if pictures is not None:
            return pictures
        time.sleep(0.5)
