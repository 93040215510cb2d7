"""Train the VQ image tokenizer on the pictures of the given shards. torchrun gives several ranks."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.files import check_output


def main(arguments: list[str] | None = None) -> int:
    """Parse, prepare pictures, train or continue, say what was reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="GLOB", help="tars, parquet, jsonl or data set folders")
    add("--output", required=True, metavar="DIR", help="tokenizer folder to make; unfinished work lies in DIR.work")
    add("--config", metavar="YAML", help="settings (megacm3/tokenizers/image_config.py explains each)")
    add("--held-out", nargs="+", metavar="GLOB", help="pictures for the report that are not trained on")
    add("--min-side", type=int, default=32, help="leave out smaller pictures (default %(default)s)")
    add("--max-reject-rate", type=float, default=0.05, metavar="R", help="fail above this share (default %(default)s)")
    add("--overwrite", action="store_true", help="replace a tokenizer, or unfinished work, of other inputs or settings")
    add("overrides", nargs="*", metavar="key=value", help="settings over the YAML's, such as train.steps=1000")
    given = parser.parse_args(arguments)
    check_output(given.output)

    from megacm3.tokenizers.image_config import load_image_config
    from megacm3.tokenizers.image_job import run_job

    config = load_image_config(given.config, given.overrides)
    report = run_job(
        config,
        given.input,
        given.output,
        held_out=given.held_out,
        min_side=given.min_side,
        max_reject_rate=given.max_reject_rate,
        overwrite=given.overwrite,
    )
    if int(os.environ.get("RANK", 0)) == 0:
        if report.pop("finished_before", False):
            print(f"{given.output} is finished already: same inputs and settings")
        print(f"{given.output}: {report['steps']} steps in {report['seconds']} s")
        for name in ("training", "held_out"):
            figures = ", ".join(f"{key} {value}" for key, value in report.get(name, {}).items())
            if figures:
                print(f"  {name.replace('_', ' ')} pictures: {figures}")
    return 0


if __name__ == "__main__":
    run(main)
