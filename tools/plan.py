"""What a model costs in a layout: parameters, FLOPs, bytes on each rank, communication, bubble; and layouts that fit.

Without --tensor, --pipeline and --zero the layouts that fit the given GPUs are suggested, and the best one is shown.
--dry-run builds every rank's stage on the meta device under a fake process group, in seconds and without a GPU.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--preset", metavar="NAME", help="such as chameleon_34b (megacm3/presets.py)")
    what.add_argument("--config", metavar="YAML", help="a trainer's config; its layout is the one shown")
    add("--gpus", type=int, required=True, metavar="N", help="how many")
    add("--gpu", metavar="KIND", help="a100-40g, a100-80g, h100-80g, h200-141g, l40s-48g: says what fits")
    add("--tensor", type=int, metavar="T", help="tensor-parallel ranks")
    add("--pipeline", type=int, metavar="P", help="pipeline stages")
    add("--zero", type=int, choices=(0, 1, 2, 3), metavar="Z", help="ZeRO stage, 0 to 3")
    add("--sequence", action="store_true", help="sequence parallel")
    add("--recompute", choices=("none", "selective", "full"), help="activations computed again in the backward pass")
    add("--micro-batch", type=int, metavar="B", help="sequences of one forward pass on one rank")
    add("--dry-run", action="store_true", help="build every rank's stage without memory and count collectives")
    add("overrides", nargs="*", metavar="key=value", help="config keys, for example model.sequence_length=8192")
    return parser


def _overrides(given: argparse.Namespace) -> list[str]:
    zero = Path(__file__).resolve().parents[1] / "ds_configs" / f"zero{given.zero}.json"
    values = {
        "model.preset": given.preset,
        "parallel.tensor": given.tensor,
        "parallel.pipeline": given.pipeline,
        "parallel.sequence": "true" if given.sequence else None,
        "parallel.recompute": given.recompute,
        "train.micro_batch": given.micro_batch,
        "deepspeed": None if given.zero is None else zero,
    }
    return [f"{key}={value}" for key, value in values.items() if value is not None] + given.overrides


def main(arguments: list[str] | None = None) -> int:
    """Parse, plan, print."""
    given = _parser().parse_args(arguments)

    from megacm3.errors import ConfigError
    from megacm3.planning.plan import gpu, make_plan, suggest
    from megacm3.planning.text import dry_run_lines, report, suggestion_lines
    from megacm3.resolve import load_config

    if given.gpus < 1:
        raise ConfigError(f"--gpus {given.gpus}; expected at least 1")
    kind = gpu(given.gpu) if given.gpu else None
    config = load_config(given.config, _overrides(given))
    chosen = given.config or any(value is not None for value in (given.tensor, given.pipeline, given.zero))
    if kind and not chosen:
        plans = suggest(config, given.gpus, kind)
        print("\n".join(suggestion_lines(plans, kind)), end="\n\n")
        plan = plans[0]
    else:
        plan = make_plan(config, given.gpus)
    print(report(plan, kind), flush=True)
    if given.dry_run:
        from megacm3.parallel.dryrun import dry_run

        print("\n".join(dry_run_lines(plan, dry_run(plan.config, given.gpus))))
    return 0


if __name__ == "__main__":
    run(main)
