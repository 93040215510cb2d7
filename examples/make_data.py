"""Makes examples/data: about 500 small pictures with captions, as webdataset shards, from the full emoji tar.

    python examples/make_data.py --source fluent-emoji-00000.tar [--output examples/data]

The source is a webdataset tar of KEY.webp (128 x 128, RGBA), KEY.txt (caption), KEY.json (category, skin_tone): Fluent
Emoji as packaged by @lobehub/fluent-emoji-3d 1.1.0, named by emoji-datasource-google 16.0.0 (licences:
examples/data/LICENSES.md). The shards are kept in the repository, so that nobody has to run this; it shows how
they were made, and the same source and the same Pillow give the same bytes.
"""

import argparse
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.errors import ConfigError, DataError

CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places")
HELD_OUT = 0.05
SIZE = 48


def fraction(purpose: str, key: str) -> float:
    """A number in [0, 1) from `purpose` and `key` alone: a sample stays in its split when others come or go."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def read_samples(path: Path) -> dict[str, dict[str, bytes]]:
    """All members of a webdataset tar: key -> {extension: bytes}. Raises DataError unless each has the three."""
    samples: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                handle = tar.extractfile(member)
                if handle is not None:
                    key, _, extension = member.name.partition(".")
                    samples.setdefault(key, {})[extension] = handle.read()
    except (OSError, tarfile.TarError) as fault:
        why = getattr(fault, "strerror", "it is none")
        raise DataError(f"--source {path} cannot be read as a tar: {why}") from fault
    for key, sample in samples.items():
        if not {"webp", "txt", "json"} <= sample.keys():
            raise DataError(f"--source {path}: {key} has {', '.join(sample)}; expected webp, txt and json of each key")
    return samples


def wanted(sample: dict[str, bytes], all_categories: bool) -> bool:
    """Whole categories, and of each figure only the one without a skin tone (the others repeat it in other colours)."""
    about = json.loads(sample["json"])
    return (all_categories or about["category"] in CATEGORIES) and not about["skin_tone"]


def small_picture(data: bytes) -> bytes:
    """The picture at SIZE x SIZE pixels as lossless RGB webp.

    Transparency is flattened on white here: a reader that drops the alpha channel instead would show the colour that
    lies below the transparent pixels, and the pixel distances of the fidelity figure would depend on the reader. The
    lowest of the eight bits is dropped (54 dB against the unrounded picture): noise, and a tenth of the bytes.
    """
    picture = Image.open(io.BytesIO(data)).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture).convert("RGB")
    rounded = flat.point(lambda value: min(255, (value + 1) // 2 * 2))
    buffer = io.BytesIO()
    rounded.save(buffer, "webp", lossless=True, quality=100, method=6)
    return buffer.getvalue()


def write_shard(path: Path, samples: dict[str, dict[str, bytes]], keys: list[str]) -> None:
    """A webdataset tar of KEY.txt and KEY.webp whose bytes depend on the samples alone: no time, no owner."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key in keys:
            for extension, data in (("txt", samples[key]["txt"]), ("webp", small_picture(samples[key]["webp"]))):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size, member.mode, member.mtime = len(data), 0o644, 0
                tar.addfile(member, io.BytesIO(data))


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="webdataset tar with KEY.webp, KEY.txt and KEY.json")
    folder = Path(__file__).resolve().parent / "data"
    parser.add_argument("--output", type=Path, default=folder, help="folder of the shards (default: examples/data)")
    parser.add_argument("--all-categories", action="store_true", help="about 1,600 pairs instead of 500")
    parser.add_argument("--held-out", type=float, default=HELD_OUT, metavar="SHARE", help="default %(default)s")
    arguments = parser.parse_args(given)
    if not 0 <= arguments.held_out < 1:
        raise ConfigError(f"--held-out {arguments.held_out}; expected a share of 0 or more, below 1")

    found = read_samples(arguments.source)
    samples = {key: sample for key, sample in found.items() if wanted(sample, arguments.all_categories)}
    if not samples:
        raise DataError(f"--source {arguments.source} has no sample of the categories {', '.join(CATEGORIES)}")
    # A keyed order, since the source's order is that of the code points and would put one category into one shard.
    order = sorted(samples, key=lambda key: fraction("order", key))
    held_out = [key for key in order if fraction("heldout", key) < arguments.held_out]
    training = [key for key in order if fraction("heldout", key) >= arguments.held_out]
    half = (len(training) + 1) // 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, keys in (("train-00000", training[:half]), ("train-00001", training[half:]), ("heldout-00000", held_out)):
        path = arguments.output / f"{name}.tar"
        write_shard(path, samples, keys)
        print(f"{path}: {len(keys)} pairs, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
