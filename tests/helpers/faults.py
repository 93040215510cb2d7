"""Known faults of the plain combination of megatron-core and DeepSpeed, to be put back on purpose on a rank.

A test that compares layouts must turn red with each of them, or it shows nothing.
"""

from typing import Any


def put_back(fault: str) -> None:
    """Undo one of the cures in this process; empty = none."""
    if fault:
        {"unsummed": _unsummed, "partitioned": _partitioned, "tied_twice": _tied_twice}[fault]()


def _unsummed() -> None:
    # Gradients of q/k norms, and of all norms under sequence parallel, are not summed over the tensor ranks.
    from megacm3.model import layers

    layers.summed_over_tensor_ranks = lambda parameter, context: parameter  # type: ignore[assignment]


def _partitioned() -> None:
    # DeepSpeed's default: stages hand on slices of activations that tensor ranks are thought to share.
    from megacm3.parallel import engine

    fill = engine.fill_deepspeed_json

    def faulty(config: Any, data: int) -> dict[str, Any]:
        return fill(config, data) | {"pipeline": {"pipe_partitioned": True, "grad_partitioned": True}}

    engine.fill_deepspeed_json = faulty  # type: ignore[assignment]


def _tied_twice() -> None:
    # DeepSpeed's own clipping at ZeRO-0 counts a tied table once a stage.
    from megacm3.parallel import engine

    fill, build = engine.fill_deepspeed_json, engine.build_optimizer

    def faulty(config: Any, data: int) -> dict[str, Any]:
        return fill(config, data) | {"gradient_clipping": config.optimizer.clip}

    engine.fill_deepspeed_json = faulty  # type: ignore[assignment]
    engine.build_optimizer = lambda config, module, own_clip: build(config, module, False)
    engine.own_clipping = lambda tree: False
