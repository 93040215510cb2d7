"""A DeepSpeed engine over the model's stages, with or without its pipeline, and one step of it.

Faults of the plain combination of megatron-core and DeepSpeed are closed here and beside (each has a test that goes red
without its cure): the pipeline hand-off under sequence parallel (deepspeed_json.py), gradients of replicated parameters
(replicated.py), the gradient norm of a tied table at ZeRO-0 and an optimizer step too many in bf16 (optimizer.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megacm3.config import Config
from megacm3.faults import Poison
from megacm3.model.block import pack
from megacm3.model.kernels import capabilities, choose
from megacm3.model.loss import IGNORE, POSITION_BUCKETS, SUMS, LossState
from megacm3.model.stages import Head, Network, Stage, Words, list_stages
from megacm3.parallel.clock import ForwardClock
from megacm3.parallel.context import ParallelContext, deepspeed_mpu
from megacm3.parallel.deepspeed_json import fill_deepspeed_json, own_clipping, zero_stage
from megacm3.parallel.gate import NONFINITE, SPIKE, Gate
from megacm3.parallel.optimizer import build_optimizer, start_clipping
from megacm3.parallel.pipeline import announce_phases, pipeline_module

__all__ = ["NONFINITE", "SPIKE", "Engine", "StepResult"]


@dataclass
class StepResult:
    """What one optimizer step gave, equal on all ranks."""

    sums: torch.Tensor
    """fp64 [8] over the global batch: nll, logZ^2, logZ, targets, text nll, text targets, image nll, image targets."""
    grad_norm: float
    """Global L2 norm before clipping."""
    output_norm: float
    """Root mean square of the last block's output."""
    positions: torch.Tensor = field(default_factory=lambda: torch.zeros(2, POSITION_BUCKETS, dtype=torch.float64))
    """fp64 [2, buckets]: nll and targets in each equal part of the sequence."""
    refused: int = 0
    """Why no parameter was changed: NONFINITE, SPIKE; 0 = the step was applied."""
    finite_gradients: bool = True

    @property
    def loss(self) -> float:
        """Mean over the targets of the global batch, in nats."""
        return float(self.sums[0] / self.sums[3].clamp(min=1))


class Engine:
    """A DeepSpeed engine, with or without its pipeline, behind one `train_step`."""

    def __init__(self, config: Config, context: ParallelContext, kinds: torch.Tensor) -> None:
        import deepspeed

        self.config, self.context, self.state = config, context, LossState()
        self.json = fill_deepspeed_json(config, context.data)
        self.zero_stage = zero_stage(self.json)
        kernels = choose(capabilities(context.device), config)
        if context.rank == 0:
            kernels.report()
        self.module = self._build(list_stages(config, context, kinds, self.state, kernels))
        optimizer = build_optimizer(config, self.module, own_clipping(self.json))
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module,
            optimizer=optimizer,
            config=self.json,
            mpu=None if context.pipeline > 1 else deepspeed_mpu(context),
        )
        self.clock = ForwardClock(self.module, context)
        self.poison = Poison(self.module, context.rank)
        self.on_phase: Callable[[str], None] = lambda name: None
        self._gate = Gate(self.optimizer, self.zero_stage, self._is_refused)
        if context.pipeline > 1:
            announce_phases(
                self.engine, lambda name: self.on_phase(name if self.engine.module.training else "evaluate")
            )
        if own_clipping(self.json):
            start_clipping(self.optimizer, context, config.optimizer.clip)
        if self.zero_stage == 0 and context.data == 1:
            # Else each gradient is copied into a bucket, summed over one rank, and copied back.
            side = "pipeline_enable_backward_allreduce" if context.pipeline > 1 else "enable_backward_allreduce"
            setattr(self.engine, side, False)

    def _build(self, stages: list[Stage]) -> torch.nn.Module:
        if self.context.pipeline > 1:
            return pipeline_module(stages, self.context)
        if self.zero_stage < 3:
            return Network(stages)
        from deepspeed.runtime.zero.partition_parameters import Init
        from deepspeed.runtime.zero.partition_parameters import register_external_parameter as register

        def partition(module: torch.nn.Module) -> None:
            group, mpu = self.context.data_group, deepspeed_mpu(self.context)
            Init(module, data_parallel_group=group, mem_efficient_linear=False, config_dict_or_path=self.json, mpu=mpu)

        # Cut stage by stage, so that no rank ever holds more than one whole stage.
        network = Network(stages, built=partition)
        head, words = network.stages[-1], network.stages[0]
        assert isinstance(head, Head) and isinstance(words, Words)
        for parameter in words.parameters() if head.tied_to else ():
            register(head, parameter)  # the head needs the table gathered, though another module owns it
        return network

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of all parameter groups; the schedule is a function of the step, never stored."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _inputs(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.context.device
        meta = pack(batch["numbers"], batch["documents"], batch["targets"])
        return batch["tokens"].to(device, non_blocking=True), meta.to(device, non_blocking=True)

    def train_step(
        self,
        micro_batches: list[dict[str, torch.Tensor]],
        is_spike: Callable[[float], bool] = lambda loss: False,
        *,
        rehearse: bool = False,
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches (tokens, targets, documents, numbers; see data/loader).

        No parameter changes on any rank when a loss or gradient of any is not finite, when `is_spike` (asked with the
        loss of the global batch, on every rank) says so, or in a rehearsal.
        """
        context, state = self.context, self.state
        self.clock.reset()
        self._is_spike, self._rehearse = is_spike, rehearse
        self._sums: torch.Tensor | None = None
        self._refused, self._finite = 0, True
        self.on_phase("forward")
        self.poison.batch(int(micro_batches[0]["numbers"][0]))
        targets = torch.tensor([sum(int((b["targets"] != IGNORE).sum()) for b in micro_batches)], device=context.device)
        dist.all_reduce(targets, group=context.data_group)
        state.scale = context.data / max(1, int(targets))
        state.sums, state.output_norm = None, []
        if context.pipeline > 1:
            state.scale *= len(micro_batches)  # which DeepSpeed's pipeline divides by, too
            unused = torch.zeros(1)
            self.engine.train_batch(iter((self._inputs(b), unused) for b in micro_batches))
        else:
            for batch in micro_batches:
                self.on_phase("forward")
                loss = self.engine(*self._inputs(batch))
                self.on_phase("backward")
                self.engine.backward(loss * len(micro_batches))  # which DeepSpeed divides by
                self.engine.step()
        return self._result()

    def _is_refused(self, finite: bool) -> bool:
        """Asked before each optimizer step, with whether this rank's gradients are finite; all ranks agree."""
        self.on_phase("optimizer")
        if self.state.sums is not None:
            self.poison.loss(self.state.sums)
        self._sums = self._reduced()
        loss = float(self._sums[0] / self._sums[3].clamp(min=1))
        if not (finite and math.isfinite(loss)):
            mine = NONFINITE
        else:
            mine = SPIKE if self._is_spike(loss) else 0
        worst = torch.tensor([mine, int(not finite)], device=self.context.device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        self._refused, self._finite = int(worst[0]), not int(worst[1])
        return self._refused > 0 or self._rehearse

    @torch.no_grad()
    def evaluate(self, micro_batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """The sums of `StepResult.sums` without any update or dropout. As many micro-batches on every data rank.

        With a pipeline all micro-batches have one shape, which need not be the training's.
        """
        self.state.sums, self.state.output_norm = None, []
        if self.context.pipeline > 1:
            unused = torch.zeros(1)
            self.engine.reset_activation_shape()
            batches = iter((self._inputs(b), unused) for b in micro_batches)
            self.engine.eval_batch(
                batches, compute_loss=False, reduce_output=None, num_micro_batches=len(micro_batches)
            )
            self.engine.reset_activation_shape()
        else:
            self.engine.eval()
            for batch in micro_batches:
                self.on_phase("evaluate")
                self.engine(*self._inputs(batch))
            self.engine.train()
        return self._reduced()[:8]

    def target_logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The logits of a micro-batch's targets, fp64 [T x B], positions first; equal on all ranks. No dropout.

        Collective; the same micro-batch on every rank.
        """
        found: list[torch.Tensor] = []
        self.state.target_logits = found
        self.evaluate([batch])
        self.state.target_logits = None
        logits = torch.zeros(batch["targets"].numel(), dtype=torch.float64, device=self.context.device)
        if found:
            logits += found[0]
        if self.context.pipeline > 1:
            dist.all_reduce(logits, group=self.context.pipeline_group)
        return logits.cpu()

    def _reduced(self) -> torch.Tensor:
        sums = torch.zeros(SUMS + 2, dtype=torch.float64, device=self.context.device)
        if self.state.sums is not None:
            sums[:SUMS] = self.state.sums
            sums[SUMS] = torch.stack(self.state.output_norm).double().mean()
            sums[SUMS + 1] = 1.0
        context = self.context
        dist.all_reduce(sums, group=context.data_group)
        if context.sequence:
            # Each tensor rank saw its own positions only; the loss sums are equal on all.
            dist.all_reduce(sums, group=context.tensor_group)
            sums[:SUMS] /= context.tensor
        if context.pipeline > 1:
            dist.all_reduce(sums, group=context.pipeline_group)
        return sums.cpu()

    def _result(self) -> StepResult:
        sums = self._reduced() if self._sums is None else self._sums
        own = getattr(self.optimizer, "optimizer", self.optimizer)
        norm = own.grad_norm if own_clipping(self.json) else self.engine.get_global_grad_norm()
        output = float((sums[SUMS] / sums[SUMS + 1]).sqrt())
        grad_norm = float(norm or 0.0) if self._finite else math.nan
        positions = sums[8:SUMS].view(2, -1)
        return StepResult(sums[:8], grad_norm, output, positions, self._refused, self._finite)
