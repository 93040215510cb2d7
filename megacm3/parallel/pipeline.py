"""The list of stages as a DeepSpeed pipeline."""

from collections.abc import Callable
from typing import Any

import torch

from megacm3.model.stages import Stage
from megacm3.parallel.context import ParallelContext


def bounds(blocks: list[bool], pipeline: int) -> list[int]:
    """Where each pipeline stage begins in the list, and its length: blocks spread evenly.

    blocks: whether each entry is a block. What stands before the first block goes to the first stage, what follows the
    last one to the last.
    """
    first, share = blocks.index(True), sum(blocks) // pipeline
    return [0, *(first + share * stage for stage in range(1, pipeline)), len(blocks)]


def pipeline_module(stages: list[Stage], context: ParallelContext) -> torch.nn.Module:
    """A DeepSpeed PipelineModule that builds this rank's share of the stages."""
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    class Built(LayerSpec):
        """A spec that calls a stage's own build function."""

        def __init__(self, stage: Stage) -> None:
            super().__init__(torch.nn.Module)
            self.stage = stage

        def build(self, log: bool = False) -> torch.nn.Module:
            return self.stage.build()

    class BuiltTied(TiedLayerSpec):
        """The same for the table, shared between the first stage and the head."""

        def __init__(self, stage: Stage) -> None:
            super().__init__("table", torch.nn.Module, forward_fn=stage.tied_call, tied_weight_attr=stage.tied_weights)
            self.stage = stage

        def build(self, log: bool = False) -> torch.nn.Module:
            return self.stage.build()

    class Pipeline(PipelineModule):
        """Cut by `bounds`, not by DeepSpeed's rules, which count parameters or classes."""

        def _partition_layers(self, method: str = "uniform") -> None:
            self.parts = bounds([stage.is_block for stage in stages], self.num_stages)
            stage_id = self._topo.get_coord(self.global_rank).pipe
            self._set_bounds(start=self.parts[stage_id], stop=self.parts[stage_id + 1])

        def get_tied_weights_and_groups(self) -> list[tuple[torch.nn.Parameter, Any]]:
            # Frozen weights have no gradients to sum.
            return [pair for pair in super().get_tied_weights_and_groups() if pair[0].requires_grad]

    tied = any(stage.tied_call is not None for stage in stages)
    layers: list[Any] = [BuiltTied(stage) if stage.is_table and tied else Built(stage) for stage in stages]
    topology = PipeModelDataParallelTopology(num_pp=context.pipeline, num_mp=context.tensor, num_dp=context.data)
    return Pipeline(layers, topology=topology, loss_fn=lambda loss, _: loss)


def announce_phases(engine: Any, on_phase: Callable[[str], None]) -> None:
    """Have a DeepSpeed pipeline engine say when it goes forward and backward."""
    from deepspeed.runtime.pipe import schedule

    def announced(name: str, act: Callable[..., None]) -> Callable[..., None]:
        def first_say(self: Any, *arguments: Any, **more: Any) -> None:
            on_phase(name)
            act(self, *arguments, **more)

        return first_say

    table = dict(engine._INSTRUCTION_MAP)
    for instruction, name in ((schedule.ForwardPass, "forward"), (schedule.BackwardPass, "backward")):
        table[instruction] = announced(name, table[instruction])
    engine._INSTRUCTION_MAP = table
