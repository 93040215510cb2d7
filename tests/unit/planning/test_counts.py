"""The planner's arithmetic against torch's own counter, and by hand."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megacm3.config import Config
from megacm3.errors import ConfigError
from megacm3.model.block import pack
from megacm3.model.loss import LossState
from megacm3.model.stages import Network, list_stages
from megacm3.parallel.context import ParallelContext, build_context
from megacm3.parallel.dryrun import FORMULAS
from megacm3.planning.counts import flops_per_token, forward_flops, logical_shapes, sequence_flops
from megacm3.planning.layout import bubble, layout_of, rank_parameters, stage_names
from megacm3.planning.memory import activation_bytes, state_bytes
from megacm3.resolve import load_config
from tests.helpers.memory import live_bytes

FAMILIES = ("tiny_cm3leon", "tiny_chameleon_7b", "tiny_chameleon_34b", "tiny_modern")


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    """A world of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_context(config("tiny_cm3leon"), torch.device("cpu"))
    dist.destroy_process_group()


def config(preset: str, *overrides: str) -> Config:
    return load_config(None, [f"model.preset={preset}", *overrides])


def built(made: Config, context: ParallelContext) -> tuple[Network, torch.Tensor, torch.Tensor]:
    """(network, tokens, meta) of one micro-batch."""
    kinds = torch.zeros(made.model.vocab_size, dtype=torch.uint8)
    size, length = made.train.micro_batch, made.model.sequence_length
    ids = torch.arange(size * length).reshape(size, length) % made.model.vocab_size
    documents = torch.arange(length).expand(size, -1) // 10
    return Network(list_stages(made, context, kinds, LossState())), ids, pack(torch.arange(size), documents, ids)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("preset", FAMILIES)
def test_flops_are_those_of_torchs_counter(preset: str, recompute: str, context: ParallelContext) -> None:
    """Attention in plain products, which the counter knows; the loss's in-place product has its formula registered."""
    made = config(preset, f"parallel.recompute={recompute}", "train.micro_batch=2")
    network, tokens, meta = built(made, context)
    only = {torch.ops.aten.addmm_: FORMULAS[torch.ops.aten.addmm_]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=only) as counter:
        network(tokens, meta).backward()
    assert counter.get_total_flops() == 2 * sequence_flops(made.model, recompute)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(tokens, meta)
    forward = forward_flops(made.model)
    assert counter.get_total_flops() == 2 * (forward.blocks + forward.head)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_flops_with_the_kernel_that_is_used(recompute: str, context: ParallelContext) -> None:
    """The CPU's flash attention, with a formula for it: a fused kernel is repeated whole under selective recompute."""
    made = config("tiny_chameleon_7b", f"parallel.recompute={recompute}")
    network, tokens, meta = built(made, context)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        network(tokens, meta).backward()
    assert counter.get_total_flops() == sequence_flops(made.model, recompute)


def test_flops_per_token_by_hand() -> None:
    """6 x the matrices' numbers, plus 12 x layers x hidden x length for attention (Chameleon 7B: 4,096 positions)."""
    model = config("chameleon_7b").model
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 65536 * 4096
    assert flops_per_token(model) == 6 * matrices + 12 * 32 * 4096 * 4096


SAVED = [
    (preset, recompute, extra)
    for preset in FAMILIES
    for recompute in ("none", "selective", "full")
    for extra in (("train.micro_batch=2",), ("train.dtype=bf16",))
]
SAVED += [("tiny_cm3leon", "none", ("model.dropout=0.1",)), ("tiny_cm3leon", "none", ("data.document_mask=true",))]


@pytest.mark.parametrize("preset, recompute, extra", SAVED, ids=str)
def test_activations_are_what_stays_alive(
    preset: str, recompute: str, extra: tuple[str, ...], context: ParallelContext
) -> None:
    """Bytes of all distinct storages between a forward pass and its backward pass, within 10 %."""
    made = config(preset, f"parallel.recompute={recompute}", "model.sequence_length=128", *extra)
    network, tokens, meta = built(made, context)
    network(tokens, meta).backward()
    before = live_bytes()
    # What autograd keeps becomes visible to Python: identity hooks.
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        loss = network(tokens, meta)
    measured = live_bytes() - before
    assert loss.requires_grad
    assert activation_bytes(made, layout_of(made, 1), 0) == pytest.approx(measured, rel=0.1)


def test_states_by_hand() -> None:
    """Rajbhandari et al. 2020 (ZeRO), figure 1: 16 bytes a parameter in mixed precision with Adam, cut step by step.

    Ours sums gradients in fp32, so that they take 4 bytes instead of 2 where ZeRO holds them.
    """

    def bytes_a_number(zero: int, dtype: str = "bf16", world: int = 64) -> tuple[float, float, float]:
        keys = [f"deepspeed=ds_configs/zero{zero}.json", f"train.dtype={dtype}", "train.global_batch=128"]
        made = config("tiny_cm3leon", *keys)
        memory = state_bytes(64_000, layout_of(made, world))
        return tuple(part / 64_000 for part in (memory.parameters, memory.gradients, memory.optimizer))  # type: ignore[return-value]

    assert bytes_a_number(0) == (2, 2, 12)
    assert bytes_a_number(1) == (2, 4, 12 / 64)
    assert bytes_a_number(2) == (2, 4 / 64, 12 / 64)
    assert bytes_a_number(3) == (2 / 64, 4 / 64, 12 / 64)
    assert bytes_a_number(0, "fp32") == (4, 4, 8)


def test_stages_hold_every_tensor_once_and_a_tied_table_twice() -> None:
    for preset, twice in (("cm3leon_7b", ["embed.weight"]), ("chameleon_34b", [])):
        model = config(preset).model
        names = [name for stage in range(4) for name in stage_names(model, 4, stage)]
        assert sorted(names) == sorted([*logical_shapes(model), *twice])


def test_ranks_hold_the_padding_of_the_table() -> None:
    made = config("tiny_chameleon_7b", "model.vocab_size=500", "model.vocab_rows=512", "parallel.tensor=2")
    plain = config("tiny_chameleon_7b", "model.vocab_size=500", "parallel.tensor=2")
    padded = rank_parameters(made.model, layout_of(made, 2), 0)
    assert padded - rank_parameters(plain.model, layout_of(plain, 2), 0) == 2 * 12 * 64 // 2


def test_bubble() -> None:
    """Against a replay: p stages, m micro-batches, one unit for each forward and each backward pass."""
    for stages, count in ((1, 4), (2, 4), (4, 4), (4, 32)):
        made = config(
            "tiny_cm3leon", f"parallel.pipeline={stages}", "train.micro_batch=1", f"train.global_batch={count}"
        )
        assert bubble(layout_of(made, stages)) == pytest.approx(1 - 2 * count / _steps(stages, count))


def _steps(stages: int, count: int) -> int:
    """Units that DeepSpeed's own schedule takes: its instruction lists, run by all stages in lock step."""
    from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule

    work = [list(TrainSchedule(count, stages, stage).steps()) for stage in range(stages)]
    busy = [
        any(isinstance(command, (ForwardPass, BackwardPass)) for schedule in work for command in schedule[step])
        for step in range(len(work[0]))
    ]
    return sum(busy)


def test_a_layout_that_is_not_legal_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be cut"):
        layout_of(config("tiny_cm3leon", "parallel.tensor=2"), 3)
