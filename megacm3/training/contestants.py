"""One model, trained by three programs: what `tools/benchmark.py train` runs against one another.

Each takes the same config and batches, starts from the same weights (model/init.py) and makes the same steps: AdamW
(torch's fused kernel) over two groups, clipping by the global norm.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megacm3.config import Config
from megacm3.convert.names import export_kind, names
from megacm3.model.init import draw
from megacm3.parallel.parts import whole

Batch = dict[str, torch.Tensor]


@dataclass
class Contestant:
    """A model and its loop."""

    step: Callable[[list[Batch]], float]
    """One optimizer step over micro-batches; the mean loss of its targets."""
    parameters: list[torch.nn.Parameter]


def _tensors(config: Config) -> dict[str, torch.Tensor]:
    """Every logical tensor as the trainer starts it."""
    table = names(export_kind(config.model), config.model)
    return {n.logical: draw(whole(n.logical, n.shape), config.model, config.train.seed) for n in table}


def _loop(model: torch.nn.Module, loss_of: Callable[[Batch], torch.Tensor], config: Config) -> Contestant:
    """The plain loop around a model: accumulate, clip, step."""
    settings, parameters = config.optimizer, list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (settings.betas[0], settings.betas[1])
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)

    def step(batches: list[Batch]) -> float:
        total = torch.zeros(())
        for batch in batches:
            loss = loss_of(batch) / len(batches)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return Contestant(step, parameters)


def transformers_loop(config: Config) -> Contestant:
    """(a) transformers' class, in a plain torch loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = config.model
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_size,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            max_position_embeddings=model.sequence_length,
            rms_norm_eps=model.norm_eps,
            tie_word_embeddings=model.tied,
            attn_implementation="sdpa",
        )
    )
    given = _tensors(config)
    with torch.no_grad():
        for name in names(export_kind(model), model):
            network.get_parameter(name.hf).copy_(given[name.logical])

    def loss_of(batch: Batch) -> torch.Tensor:
        logits = network(input_ids=batch["tokens"], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())

    return _loop(network, loss_of, config)


def megatron_loop(config: Config) -> Contestant:
    """(b) megatron-core's GPTModel with torch's attention, in a bare loop."""
    _one_process()
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    network = _gpt_model(config)
    _fill_gpt_model(network, config)
    length = config.model.sequence_length

    def loss_of(batch: Batch) -> torch.Tensor:
        places = torch.arange(length).expand_as(batch["tokens"])
        return network(batch["tokens"], places, None, labels=batch["targets"]).mean()  # type: ignore[no-any-return]

    return _loop(network, loss_of, config)


class _TorchAttention(torch.nn.Module):
    """megatron-core's own attention keeps the scores; this is what this trainer uses."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).flatten(2)


def _gpt_model(config: Config) -> torch.nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    model = config.model
    settings = TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        ffn_hidden_size=model.ffn_size,
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = _TorchAttention
    return GPTModel(
        settings,
        spec,
        vocab_size=model.vocab_size,
        max_sequence_length=model.sequence_length,
        position_embedding_type="rope",
        rotary_base=int(model.rope_theta),
        share_embeddings_and_output_weights=model.tied,
    )


@torch.no_grad()
def _fill_gpt_model(network: Any, config: Config) -> None:
    model, given = config.model, _tensors(config)
    size = model.hidden_size // model.heads
    network.embedding.word_embeddings.weight.copy_(given["embed.weight"])
    network.decoder.final_layernorm.weight.copy_(given["final_norm.weight"])
    if not model.tied:
        network.output_layer.weight.copy_(given["head.weight"])
    for i, layer in enumerate(network.decoder.layers):
        mine = {name: given[f"layers.{i}.{name}.weight"] for name in ("attn_norm", "attn.o", "mlp_norm", "mlp.down")}
        layer.input_layernorm.weight.copy_(mine["attn_norm"])
        layer.pre_mlp_layernorm.weight.copy_(mine["mlp_norm"])
        layer.self_attention.linear_proj.weight.copy_(mine["attn.o"])
        layer.mlp.linear_fc2.weight.copy_(mine["mlp.down"])
        layer.mlp.linear_fc1.weight.copy_(torch.cat([given[f"layers.{i}.mlp.{n}.weight"] for n in ("gate", "up")]))
        # megatron-core's rows: for each key/value head its queries, its key, its value.
        heads = [given[f"layers.{i}.attn.{n}.weight"].view(model.kv_heads, -1, size, model.hidden_size) for n in "qkv"]
        layer.self_attention.linear_qkv.weight.copy_(torch.cat(heads, dim=1).flatten(0, 2))


def _one_process() -> None:
    from megacm3.parallel.cpu import prepare

    prepare(torch.device("cpu"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def megacm3_loop(config: Config) -> Contestant:
    """(c) this trainer, one process."""
    _one_process()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed refuses to start without it
    import deepspeed

    from megacm3.parallel.context import build_context
    from megacm3.parallel.engine import Engine

    deepspeed.utils.logger.setLevel(logging.WARNING)
    context = build_context(config, torch.device("cpu"))
    engine = Engine(config, context, torch.zeros(config.model.vocab_size, dtype=torch.uint8))

    def step(batches: list[Batch]) -> float:
        engine.set_lr(config.optimizer.lr)
        sums = engine.train_step(batches).sums
        return float(sums[0] / sums[3])

    return Contestant(step, list(engine.module.parameters()))


CONTESTANTS: dict[str, Callable[[Config], Contestant]] = {
    "transformers": transformers_loop,
    "megatron-core": megatron_loop,
    "megacm3": megacm3_loop,
}
"""The programs by name."""


def random_step(config: Config, number: int) -> list[Batch]:
    """The micro-batches of one step: random tokens, each predicting the next."""
    model, train = config.model, config.train
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, model.vocab_size, (train.global_batch, model.sequence_length + 1), generator=generator)
    every = {
        "tokens": ids[:, :-1].contiguous(),
        "targets": ids[:, 1:].contiguous(),
        "documents": torch.zeros(train.global_batch, model.sequence_length, dtype=torch.int32),
        "numbers": torch.arange(train.global_batch) + number * train.global_batch,
    }
    cut = {name: values.split(train.micro_batch) for name, values in every.items()}
    return [{name: cut[name][i] for name in cut} for i in range(len(cut["tokens"]))]
