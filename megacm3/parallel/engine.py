"""From a config to a running DeepSpeed engine: its JSON filled in and checked, its optimizer, one step.

Three faults of the plain combination are closed here (each has a test that goes red without it): the pipeline hand-off
under sequence parallel (`pipe_partitioned`, `grad_partitioned` forced off), gradients of replicated parameters
(parallel/replicated.py), and the gradient norm of a tied table at ZeRO-0 (`_ClippedSteps`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megacm3.config import Config
from megacm3.errors import ConfigError
from megacm3.model.block import pack
from megacm3.model.loss import IGNORE, LossState
from megacm3.model.stages import Network, Stage, list_stages
from megacm3.parallel.context import ParallelContext, accumulation, deepspeed_mpu
from megacm3.parallel.parts import parts_of

LEGAL = """ZeRO   pipeline = 1   pipeline > 1
  0        yes            yes (fp32; bf16 needs ZeRO-1)
  1        yes            yes
  2, 3     yes            no"""
DEFAULT_JSON = Path(__file__).resolve().parent.parent.parent / "ds_configs" / "zero1.json"


def read_deepspeed_json(config: Config) -> dict[str, Any]:
    """The DeepSpeed JSON that the config names. Raises ConfigError when it is missing or not JSON."""
    path = Path(config.deepspeed or DEFAULT_JSON)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as fault:
        raise ConfigError(f"deepspeed = {path} does not exist; ds_configs/ holds one for each ZeRO stage") from fault
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise ConfigError(f"deepspeed = {path} is not JSON: {fault}") from fault
    if not isinstance(tree, dict):
        raise ConfigError(f"deepspeed = {path} holds no JSON object")
    return tree


def zero_stage(tree: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed JSON."""
    return int(tree.get("zero_optimization", {}).get("stage", 0))


def _expected(config: Config, data: int) -> dict[str, Any]:
    steps = accumulation(config, data)
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": config.optimizer.clip,
        "bf16.enabled": config.train.dtype == "bf16",
    }


_KEYS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch / (train.micro_batch x data-parallel ranks)",
    "gradient_clipping": "optimizer.clip",
    "bf16.enabled": "train.dtype",
}


def fill_deepspeed_json(config: Config, data: int) -> dict[str, Any]:
    """The DeepSpeed JSON with its "auto" values filled in. Raises ConfigError for what contradicts the config.

    data: number of data-parallel ranks.
    """
    tree = read_deepspeed_json(config)
    stage = zero_stage(tree)
    name = config.deepspeed or DEFAULT_JSON.name
    if config.parallel.pipeline > 1 and (stage > 1 or (stage == 0 and config.train.dtype == "bf16")):
        raise ConfigError(
            f"parallel.pipeline = {config.parallel.pipeline} with ZeRO stage {stage} ({name}, {config.train.dtype}) is "
            f"not possible; use ds_configs/zero1.json. Legal:\n{LEGAL}"
        )
    for section in ("optimizer", "scheduler", "fp16", "amp", "tensor_parallel", "activation_checkpointing"):
        given = tree.get(section)
        if given and (not isinstance(given, dict) or given.get("enabled", True)):
            raise ConfigError(f"{name}: section '{section}' contradicts megacm3's config, which decides it; remove it")
    for dotted, value in _expected(config, data).items():
        node = tree
        *path, leaf = dotted.split(".")
        for part in path:
            node = node.setdefault(part, {})
        found = node.get(leaf, "auto")
        if found != "auto" and found != value:
            raise ConfigError(
                f"{name}: {dotted} = {found} contradicts {_KEYS[dotted]} (= {value}); write \"auto\" or the same value"
            )
        node[leaf] = value
    pipeline = tree.setdefault("pipeline", {})
    for flag in ("pipe_partitioned", "grad_partitioned"):
        if pipeline.get(flag, False) and config.parallel.pipeline > 1:
            raise ConfigError(
                f"{name}: pipeline.{flag} = true hands wrong activations between stages when tensor ranks hold "
                "different ones; remove it or set it to false"
            )
        pipeline[flag] = False
    if stage == 0 and config.train.dtype == "fp32":
        tree["gradient_clipping"] = 0.0  # _ClippedSteps does it
    tree["zero_allow_untested_optimizer"] = True
    tree["zero_force_ds_cpu_optimizer"] = False
    tree.setdefault("steps_per_print", 10**9)
    if tree["steps_per_print"] == "auto":
        tree["steps_per_print"] = 10**9
    return tree


class _ClippedSteps:
    """Global norm and clipping inside `optimizer.step`, where ZeRO does not do it (stage 0, fp32).

    Replicated parameters count once over the tensor ranks, a tied table once over the stages.
    """

    def set_up(self, context: ParallelContext, clip: float) -> None:
        self._context, self._clip = context, clip
        self._global_grad_norm = 0.0

    def step(self, closure: Any = None) -> Any:
        context = self._context
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]  # type: ignore[attr-defined]
        total = torch.zeros((), dtype=torch.float64, device=context.device)
        for p in parameters:
            counted = p.tensor_model_parallel or context.tensor_rank == 0
            tied_copy = context.pipeline > 1 and context.is_last_stage and parts_of(p)[0].name == "embed.weight"
            if counted and not tied_copy:
                total += p.grad.double().square().sum()
        if context.tensor * context.pipeline > 1:
            dist.all_reduce(total, group=context.model_group)
        self._global_grad_norm = float(total.sqrt())
        if self._clip and self._global_grad_norm > self._clip:
            for p in parameters:
                p.grad.mul_(self._clip / (self._global_grad_norm + 1e-6))
        return super().step(closure)  # type: ignore[misc]


class _ClippedAdamW(_ClippedSteps, torch.optim.AdamW):
    pass


class _ClippedSGD(_ClippedSteps, torch.optim.SGD):
    pass


def _parameter_groups(config: Config, module: torch.nn.Module) -> list[dict[str, Any]]:
    # No decay on norm gains (common practice; the papers give one number for all).
    decayed = [p for p in module.parameters() if p.requires_grad and "norm" not in parts_of(p)[0].name]
    plain = [p for p in module.parameters() if p.requires_grad and "norm" in parts_of(p)[0].name]
    groups = [{"params": decayed, "weight_decay": config.optimizer.weight_decay}]
    return groups + ([{"params": plain, "weight_decay": 0.0}] if plain else [])


def build_optimizer(config: Config, module: torch.nn.Module, context: ParallelContext, own_clip: bool) -> Any:
    """AdamW (torch's fused kernel) or SGD over the module's parameters."""
    groups, settings = _parameter_groups(config, module), config.optimizer
    if settings.kind == "sgd":
        optimizer: Any = (_ClippedSGD if own_clip else torch.optim.SGD)(groups, lr=settings.lr)
    else:
        optimizer = (_ClippedAdamW if own_clip else torch.optim.AdamW)(
            groups, lr=settings.lr, betas=tuple(settings.betas), eps=settings.eps, fused=True
        )
    if own_clip:
        optimizer.set_up(context, settings.clip)
    return optimizer


@dataclass
class StepResult:
    """What one optimizer step gave, equal on all ranks."""

    sums: torch.Tensor
    """fp64 [8] over the global batch: nll, logZ^2, logZ, targets, text nll, text targets, image nll, image targets."""
    grad_norm: float
    """Global L2 norm before clipping."""
    output_norm: float
    """Root mean square of the last block's output."""


class Engine:
    """A DeepSpeed engine, with or without its pipeline, behind one `train_step`."""

    def __init__(self, config: Config, context: ParallelContext, kinds: torch.Tensor) -> None:
        import deepspeed

        self.config, self.context, self.state = config, context, LossState()
        self.json = fill_deepspeed_json(config, context.data)
        self.zero_stage = zero_stage(self.json)
        stages = list_stages(config, context, kinds, self.state)
        self.module: torch.nn.Module
        if context.pipeline > 1:
            self.module = _pipeline_module(stages, context)
        else:
            self.module = Network(stages)
        own_clip = self.zero_stage == 0 and config.train.dtype == "fp32"
        optimizer = build_optimizer(config, self.module, context, own_clip)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module,
            optimizer=optimizer,
            config=self.json,
            mpu=None if context.pipeline > 1 else deepspeed_mpu(context),
        )

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of all parameter groups; the schedule is a function of the step, never stored."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _inputs(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.context.device
        meta = pack(batch["numbers"], batch["documents"], batch["targets"])
        return batch["tokens"].to(device, non_blocking=True), meta.to(device, non_blocking=True)

    def train_step(self, micro_batches: list[dict[str, torch.Tensor]]) -> StepResult:
        """One optimizer step over this rank's micro-batches (tokens, targets, documents, numbers; see data/loader)."""
        context, state = self.context, self.state
        targets = torch.tensor([sum(int((b["targets"] != IGNORE).sum()) for b in micro_batches)], device=context.device)
        dist.all_reduce(targets, group=context.data_group)
        state.scale = context.data * len(micro_batches) / max(1, int(targets))
        state.sums, state.output_norm = None, []
        if context.pipeline > 1:
            unused = torch.zeros(1)
            self.engine.train_batch(iter((self._inputs(b), unused) for b in micro_batches))
        else:
            for batch in micro_batches:
                loss = self.engine(*self._inputs(batch))
                self.engine.backward(loss)
                self.engine.step()
        return self._result()

    @torch.no_grad()
    def evaluate(self, micro_batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """The sums of `StepResult.sums` without any update. Only without a pipeline."""
        assert self.context.pipeline == 1, "evaluation runs without a pipeline"
        self.state.sums, self.state.output_norm = None, []
        self.engine.eval()
        for batch in micro_batches:
            self.engine(*self._inputs(batch))
        self.engine.train()
        return self._reduced()[:8]

    def _reduced(self) -> torch.Tensor:
        sums = torch.zeros(10, dtype=torch.float64, device=self.context.device)
        if self.state.sums is not None:
            sums[:8] = self.state.sums
            sums[8] = torch.stack(self.state.output_norm).double().mean()
            sums[9] = 1.0
        context = self.context
        dist.all_reduce(sums, group=context.data_group)
        if context.sequence:
            # Each tensor rank saw its own positions only; the loss sums are equal on all.
            dist.all_reduce(sums, group=context.tensor_group)
            sums[:8] /= context.tensor
        if context.pipeline > 1:
            dist.all_reduce(sums, group=context.pipeline_group)
        return sums.cpu()

    def _result(self) -> StepResult:
        sums = self._reduced()
        norm = self.engine.get_global_grad_norm()
        return StepResult(sums[:8], float(norm or 0.0), float((sums[8] / sums[9]).sqrt()))


def _pipeline_module(stages: list[Stage], context: ParallelContext) -> torch.nn.Module:
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
            super().__init__("table", torch.nn.Module, forward_fn=stage.tied_call, tied_weight_attr="weight")
            self.stage = stage

        def build(self, log: bool = False) -> torch.nn.Module:
            return self.stage.build()

    class Pipeline(PipelineModule):
        """Blocks spread evenly; what stands before them on the first stage, what follows on the last."""

        def _partition_layers(self, method: str = "uniform") -> None:
            blocks = [i for i, stage in enumerate(stages) if stage.is_block]
            share = len(blocks) // self.num_stages
            self.parts = [0, *(blocks[0] + share * i for i in range(1, self.num_stages)), len(stages)]
            stage_id = self._topo.get_coord(self.global_rank).pipe
            self._set_bounds(start=self.parts[stage_id], stop=self.parts[stage_id + 1])

    tied = any(stage.tied_call is not None for stage in stages)
    layers = [BuiltTied(stage) if stage.is_table and tied else Built(stage) for stage in stages]
    topology = PipeModelDataParallelTopology(num_pp=context.pipeline, num_mp=context.tensor, num_dp=context.data)
    return Pipeline(layers, topology=topology, loss_fn=lambda loss, _: loss)
