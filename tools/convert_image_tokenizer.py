"""Make an image tokenizer folder from weights of taming-transformers (VQ, Gumbel) or Chameleon's vqgan.ckpt."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.files import check_output


def main(arguments: list[str] | None = None) -> int:
    """Parse, convert, say what was made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True, metavar="FILE", help="vqgan.ckpt, .pt or .safetensors")
    parser.add_argument(
        "--config", required=True, metavar="YAML", help="the YAML that came with it (model.params.ddconfig)"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="tokenizer folder to make")
    parser.add_argument(
        "--trust-pickle", action="store_true", help="read a checkpoint that can run code; only if trusted"
    )
    given = parser.parse_args(arguments)
    check_output(given.output)

    from megacm3.files import sha256_file
    from megacm3.tokenizers.image import save_image_tokenizer
    from megacm3.tokenizers.taming import read_network_config, read_weights, to_vqmodel

    config = read_network_config(given.config)
    network = to_vqmodel(read_weights(given.weights, allow_pickle=given.trust_pickle), config)
    inputs = {"weights": sha256_file(given.weights)}
    tokenizer = save_image_tokenizer(network, config.image_size, given.output, inputs=inputs)
    rows, columns = tokenizer.grid
    print(f"{given.output}: {tokenizer.image_size} px, {rows} x {columns} codes of {tokenizer.codebook_size}")
    return 0


if __name__ == "__main__":
    run(main)
