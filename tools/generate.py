"""Make pictures from texts, texts from pictures, or edited pictures with an exported model."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.errors import ConfigError
from megacm3.files import check_output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="text to picture: --prompt and --output; picture to text: --image (and --prompt); "
        "editing: --image, --prompt and --output",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="HF_DIR", help="folder made by convert_checkpoint.py to-hf")
    add("--prompt", action="append", default=[], help="text; may be given several times")
    add("--image", metavar="FILE", help="picture to describe, or to edit where --output is given")
    add("--after", default="", metavar="TEXT", help="cm3leon: what stood behind answers in tuning, such as a full stop")
    add("--output", metavar="PNG", help="where to write the picture, or a sheet of several")
    add("-n", type=int, default=1, metavar="N", help="samples a prompt (default %(default)s)")
    add("--seed", type=int, default=0, help="equal seeds give equal samples (default %(default)s)")
    add("--guidance", type=float, help="classifier-free guidance scale, 1 is off (default 3; 7.5 for editing)")
    add("--image-guidance", type=float, help="scale of the given picture in editing (default 1.5)")
    add("--contrastive-k", type=int, metavar="K", help="CD-K instead of guidance; 1 is plain CD")
    add("--contrastive-alpha", type=float, metavar="A", help="share of the K-th best probability (default 0.5)")
    add("--temperature", type=float, help="0 takes the best token (default 1 for pictures, 0 for text)")
    add("--top-p", type=float, help="default 0.8 for pictures, 1 (off) for text")
    add("--top-k", type=int, default=0, help="default %(default)s (off)")
    add("--max-tokens", type=int, default=64, help="longest text (default %(default)s)")
    add("--repetition-penalty", type=float, default=1.0, help="text only (default %(default)s, off)")
    add("--bank", metavar="BANK", help="memory bank to retrieve documents from")
    add("--documents", type=int, metavar="K", help="documents put in front of each prompt (default 2 with --bank)")
    add("--store", metavar="STORE", help="the bank's store (default: the folder `store` beside the bank)")
    add("--encoder", metavar="DIR", help="the bank's encoder (default: the bank's own copy)")
    add("--best", type=int, metavar="B", help="show only the best B of the N samples by the bank's CLIP")
    add("--int8", action="store_true", help="8-bit weights: faster on a CPU, slightly less exact")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse, generate, write or print."""
    given = _parser().parse_args(arguments)
    if given.output is not None:
        check_output(given.output, file=True)
    if given.image is None and (not given.prompt or not given.output):
        raise ConfigError("found no --image; expected --prompt and --output for a picture, or --image for a text")
    if given.output and Path(given.output).suffix.lower() != ".png":
        raise ConfigError(f"--output {given.output}: pictures are written as PNG; give a name that ends in .png")
    if given.image and given.output and not given.prompt:
        raise ConfigError("--image with --output edits a picture; expected a --prompt that says how")
    ignored = ("bank", "guidance", "image_guidance", "contrastive_k", "contrastive_alpha")
    unused = [name for name in ignored if getattr(given, name) is not None] + ["n"] * (given.n != 1)
    if not given.output and unused:
        flag = "-n" if unused[0] == "n" else "--" + unused[0].replace("_", "-")
        raise ConfigError(f"{flag} is for pictures, and without --output a text is made; leave it out")
    if given.bank is None and (given.documents or given.best or given.store or given.encoder):
        raise ConfigError("--documents, --best, --store and --encoder need a memory bank; expected --bank BANK")
    if given.best is not None and not 1 <= given.best <= given.n:
        raise ConfigError(f"--best {given.best} of -n {given.n} samples; expected 1 to {given.n}")

    from megacm3.inference.api import Generator

    generator = Generator.load(given.model, given.device, int8=given.int8)
    if given.output:
        _pictures(generator, given)
    else:
        _texts(generator, given)
    return 0


def _given(given: argparse.Namespace, *names: str) -> dict[str, object]:
    """The flags that were given, by their name; the others keep the library's defaults."""
    return {name: getattr(given, name) for name in names if getattr(given, name) is not None}


def _texts(generator, given: argparse.Namespace) -> None:
    from megacm3.evaluation.pictures import load_picture

    pixels = load_picture(given.image, generator.image_size, generator.framing)[None]
    options = _given(given, "temperature", "top_p", "top_k", "max_tokens", "repetition_penalty", "seed", "after")
    for prompt in given.prompt or [""]:
        print(generator.caption(pixels, prompt=prompt, **options)[0])


def _pictures(generator, given: argparse.Namespace) -> None:
    import numpy as np

    from megacm3.evaluation.pictures import load_picture, png_bytes, sheet
    from megacm3.files import new_file

    names = ("guidance", "image_guidance", "contrastive_k", "contrastive_alpha", "temperature", "top_p", "top_k")
    options = _given(given, *names, "seed", "n")
    prompts: list = given.prompt
    if given.image:
        # The instruction format of CM3Leon's fine-tuning (section E.1); scales of its section 4.1.
        pixels = load_picture(given.image, generator.image_size, generator.framing)
        prompts = [["Edit first image following the instruction", pixels, prompt] for prompt in given.prompt]
        options.setdefault("image_guidance", 1.5)
    retriever = None
    if given.bank:
        from megacm3.inference.retrieve import Retriever, rerank

        retriever = Retriever.open(given.bank, given.store, given.encoder, given.device)
        count = 2 if given.documents is None else given.documents
        options["retrieved"] = retriever.documents(given.prompt, count)
    pictures = generator.images(prompts, **options)
    if retriever and given.best:
        orders = [rerank(retriever.encoder, prompt, row) for prompt, row in zip(given.prompt, pictures, strict=True)]
        pictures = np.stack([row[order[: given.best]] for row, order in zip(pictures, orders, strict=True)])
    shown = pictures.shape[1]
    several = len(prompts) * shown > 1
    labels = [prompt for prompt in given.prompt for _ in range(shown)]
    flat = pictures.reshape(-1, *pictures.shape[2:])
    notes = {"prompt": "\n".join(given.prompt), "source": "made by a model (megacm3)", "seed": str(given.seed)}
    columns = shown if shown > 1 else min(4, len(prompts))
    with new_file(given.output) as path:
        path.write_bytes(png_bytes(sheet(list(flat), labels, columns) if several else flat[0], notes))
    print(f"{given.output}: {len(flat)} picture{'s' if several else ''}")


if __name__ == "__main__":
    run(main)
