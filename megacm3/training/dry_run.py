"""What a launch would start, checked and told without starting it."""

from pathlib import Path

from megacm3.config import Config, total_steps
from megacm3.parallel.context import accumulation, check_world
from megacm3.parallel.deepspeed_json import DEFAULT_JSON, fill_deepspeed_json, zero_stage


def describe(config: Config, world: int) -> str:
    """Lines on the layout, the batch, the length and the places of a run on `world` ranks. Raises ConfigError."""
    train, parallel = config.train, config.parallel
    data = check_world(config, world)
    zero = zero_stage(fill_deepspeed_json(config, data))
    steps, tokens = total_steps(config), train.global_batch * config.model.sequence_length
    lines = [
        ("model", f"{config.model.preset or config.model.family}, {train.dtype}"),
        (
            "ranks",
            f"{world}: tensor {parallel.tensor}{' with sequence parallel' if parallel.sequence else ''}, "
            f"pipeline {parallel.pipeline}, data {data}; ZeRO {zero} ({config.deepspeed or DEFAULT_JSON}), "
            f"recompute {parallel.recompute}",
        ),
        (
            "batch",
            f"{train.micro_batch} sequences x {data} data-parallel ranks x {accumulation(config, data)} accumulated "
            f"= {train.global_batch}, {tokens:,} tokens a step",
        ),
        ("length", f"{steps:,} steps, {steps * tokens:,} tokens"),
        ("saves", f"every {config.checkpoint.every} steps, keep {config.checkpoint.keep}; {config.checkpoint.resume}"),
        ("out", train.out),
    ]
    for entry in config.data.mixture:
        for path in filter(None, (entry.store, entry.neighbours)):
            lines.append(("data", path if Path(path).is_dir() else f"{path} (is not there yet)"))
    if config.checkpoint.init:
        there = "" if Path(config.checkpoint.init).is_dir() else " (is not there yet)"
        lines.append(("begins", f"with the weights of {config.checkpoint.init}{there}"))
    if config.evaluation.store:
        there = "" if Path(config.evaluation.store).is_dir() else " (is not there yet)"
        lines.append(("held out", f"{config.evaluation.store}{there}, every {config.evaluation.every} steps"))
    return "\n".join(f"{name:9}{text}" for name, text in lines)
