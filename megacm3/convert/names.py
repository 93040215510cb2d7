"""One table, used both ways: logical tensors and those of the Hugging Face classes.

opt        OPTForCausalLM without biases and norm parameters     CM3Leon
llama      LlamaForCausalLM                                      modern without q/k norm
qwen3      Qwen3ForCausalLM                                      modern with RMS q/k norm
chameleon  ChameleonForConditionalGeneration                     Chameleon, both norm orders
"""

from dataclasses import dataclass

from megacm3.config import ModelConfig
from megacm3.errors import ConfigError

OPT_OFFSET = 2
"""Rows that OPT's table of positions has before position 0."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Name:
    """A logical tensor and its counterpart."""

    logical: str
    hf: str
    shape: Shape
    """Of the logical tensor."""
    form: str = "same"
    """same | positions (OPT_OFFSET rows more) | vector (one row) | heads (a row for each head)."""
    heads: int = 0
    """Rows of the counterpart where form is heads."""

    @property
    def hf_shape(self) -> Shape:
        """Of the counterpart."""
        if self.form == "positions":
            return (self.shape[0] + OPT_OFFSET, self.shape[1])
        if self.form == "vector":
            return (self.shape[1],)
        return (self.heads, self.shape[1]) if self.form == "heads" else self.shape


def export_kind(model: ModelConfig) -> str:
    """Which row of the table a model is. Raises ConfigError, naming the keys, where no class holds it."""
    found = {name: getattr(model, name) for name in ("norm", "positions", "activation", "norm_order", "qk_norm")}
    opt = {"norm": "layernorm", "positions": "learned", "activation": "relu", "norm_order": "pre", "qk_norm": "none"}
    llama = {"norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "norm_order": "pre", "qk_norm": "none"}
    if found == opt and model.kv_heads == model.heads and model.norm_eps == 1e-5:
        return "opt"
    if found == llama:
        return "llama"
    if found == llama | {"qk_norm": "rmsnorm"} and model.qk_norm_groups == 1:
        return "qwen3"
    if found == llama | {"qk_norm": "layernorm", "norm_order": model.norm_order} and model.norm_eps == 1e-5:
        return "chameleon"
    told = ", ".join(f"model.{key} = {value}" for key, value in found.items())
    raise ConfigError(
        f"no Hugging Face class holds {told}, model.kv_heads = {model.kv_heads}, model.norm_eps = {model.norm_eps}, "
        f"model.qk_norm_groups = {model.qk_norm_groups}; the presets' combinations can be exported"
    )


def names(kind: str, model: ModelConfig) -> list[Name]:
    """The table of one model, in the order in which its tensors are used."""
    prefix = "model.decoder" if kind == "opt" else "model"
    hidden, table = model.hidden_size, (model.vocab_size, model.hidden_size)
    rows = [Name("embed.weight", f"{prefix}.embed_tokens.weight", table)]
    if kind == "opt":
        shape = (model.sequence_length, hidden)
        rows.append(Name("positions.weight", f"{prefix}.embed_positions.weight", shape, "positions"))
    for i in range(model.layers):
        layer = _opt_layer(model) if kind == "opt" else _llama_layer(kind, model)
        rows += [
            Name(f"layers.{i}.{n.logical}", f"{prefix}.layers.{i}.{n.hf}", n.shape, n.form, n.heads) for n in layer
        ]
    if kind != "opt":
        rows.append(Name("final_norm.weight", "model.norm.weight", (hidden,)))
    if not model.tied:
        rows.append(Name("head.weight", "lm_head.weight", table))
    return rows


def _projections(model: ModelConfig, out: str) -> list[Name]:
    size, hidden = model.hidden_size // model.heads, model.hidden_size
    q, kv = (model.heads * size, hidden), (model.kv_heads * size, hidden)
    return [
        Name("attn.q.weight", "self_attn.q_proj.weight", q),
        Name("attn.k.weight", "self_attn.k_proj.weight", kv),
        Name("attn.v.weight", "self_attn.v_proj.weight", kv),
        Name("attn.o.weight", f"self_attn.{out}.weight", (hidden, q[0])),
    ]


def _opt_layer(model: ModelConfig) -> list[Name]:
    up, down = (model.ffn_size, model.hidden_size), (model.hidden_size, model.ffn_size)
    feed_forward = [Name("mlp.up.weight", "fc1.weight", up), Name("mlp.down.weight", "fc2.weight", down)]
    return _projections(model, "out_proj") + feed_forward


def _llama_layer(kind: str, model: ModelConfig) -> list[Name]:
    up, down = (model.ffn_size, model.hidden_size), (model.hidden_size, model.ffn_size)
    rows = [Name("attn_norm.weight", "input_layernorm.weight", (model.hidden_size,)), *_projections(model, "o_proj")]
    size = model.hidden_size // model.heads
    for side, heads in (("q", model.heads), ("k", model.kv_heads)) if kind in ("qwen3", "chameleon") else ():
        # As in model/layers.py: k has at most as many rows as heads.
        shape = (min(model.qk_norm_groups, heads), size)
        for part in ("weight",) if kind == "qwen3" else ("weight", "bias"):
            form = "vector" if kind == "qwen3" else "heads"
            rows.append(Name(f"attn.{side}_norm.{part}", f"self_attn.{side}_norm.{part}", shape, form, heads))
    return [
        *rows,
        Name("mlp_norm.weight", "post_attention_layernorm.weight", (model.hidden_size,)),
        Name("mlp.gate.weight", "mlp.gate_proj.weight", up),
        Name("mlp.up.weight", "mlp.up_proj.weight", up),
        Name("mlp.down.weight", "mlp.down_proj.weight", down),
    ]


def head_rows(groups: int, heads: int) -> list[int]:
    """Row of a q/k norm for each head, as model/layers.py chooses it."""
    return [head * groups // heads for head in range(heads)]
