"""Chameleon as Meta released it (and Anole, which kept the form): `consolidated.*.pth`, seen as transformers' tensors.

Differences: matrices are cut over the shards; rows of q and k, and their norms, are in the interleaved order of rotary
pairs; each shard has a q/k norm of its own, shared by its heads.
"""

import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megacm3.checkpoint.boxes import Box, whole
from megacm3.checkpoint.tensors import DTYPES, OpenFiles, read_header
from megacm3.convert.carried import tokenizers_of_release
from megacm3.convert.folder import Source
from megacm3.convert.unpickle import unpickle
from megacm3.convert.vq import VqModel
from megacm3.errors import CheckpointError
from megacm3.files import read_json

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_FORMS = {
    "self_attn.q_proj.weight": ("attention.wq.weight", 0),
    "self_attn.k_proj.weight": ("attention.wk.weight", 0),
    "self_attn.v_proj.weight": ("attention.wv.weight", 0),
    "self_attn.o_proj.weight": ("attention.wo.weight", 1),
    "self_attn.q_norm.weight": ("attention.q_normalization.weight", None),
    "self_attn.q_norm.bias": ("attention.q_normalization.bias", None),
    "self_attn.k_norm.weight": ("attention.k_normalization.weight", None),
    "self_attn.k_norm.bias": ("attention.k_normalization.bias", None),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", 0),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", 1),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", 0),
    "input_layernorm.weight": ("attention_norm.weight", None),
    "post_attention_layernorm.weight": ("ffn_norm.weight", None),
}
"""transformers' name in a layer -> (Meta's, dimension along which the shards are joined; None = each has the whole)."""
_TOP = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", 1),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
}


def is_meta_folder(folder: Path) -> bool:
    """Whether a folder holds Meta's form."""
    return (folder / "params.json").is_file() and any(folder.glob("consolidated*.pth"))


class MetaFolder(Source):
    """The shards of a folder. Raises CheckpointError for what is missing, or when pickles are not trusted."""

    def __init__(self, folder: str | Path, scratch: Path, *, trust_pickle: bool) -> None:
        self.folder = Path(folder)
        pickles = sorted(self.folder.glob("consolidated*.pth"))
        if not trust_pickle:
            raise CheckpointError(
                f"{pickles[0]} is a pickle: reading it can run code of its maker; give --trust-pickle if you trust it"
            )
        self._shards = [f"{path.stem}.safetensors" for path in pickles]
        for path, name in zip(pickles, self._shards, strict=True):
            unpickle(path, scratch / name)
        self._files = OpenFiles(scratch)
        self._headers = [read_header(scratch / name) for name in self._shards]
        self.params = self._read_params()
        self.heads, dim = self.params["n_heads"], self.params["dim"]
        self.kv_heads = self.params.get("n_kv_heads") or self.heads
        self.size = dim // self.heads
        self.config = self._config()
        release = self.folder.parent.parent / "tokenizer"
        self.tokenizers = tokenizers_of_release(release, self.config["vocab_size"], scratch)
        if "image_tokenizer" in self.tokenizers:
            vq = VqModel.of(self.tokenizers["image_tokenizer"])
            self.config |= {"vq_config": vq.config} if isinstance(vq, VqModel) else {}
        self.tensors = self._tensors()

    def _read_params(self) -> dict[str, Any]:
        params = read_json(self.folder / "params.json", error=CheckpointError)
        extra = self.folder / "consolidate_params.json"
        further = read_json(extra, error=CheckpointError) if extra.is_file() else {}
        merged = params | params.get("model", {}) | further | further.get("model", {})
        missing = [key for key in ("dim", "n_layers", "n_heads", "norm_eps") if key not in merged]
        if missing:
            raise CheckpointError(f"{self.folder / 'params.json'} lacks the key '{missing[0]}'")
        if not merged.get("qk_normalization", True):
            raise CheckpointError(f"{self.folder}: qk_normalization is false; Chameleon's layers have q/k norms")
        return merged  # type: ignore[no-any-return]

    def _entry(self, name: str, shard: int = 0) -> tuple[torch.dtype, tuple[int, ...]]:
        entry = self._headers[shard].get(name)
        if entry is None:
            raise CheckpointError(f"{self.folder}: shard {shard} of {len(self._shards)} lacks {name}")
        return DTYPES[entry["dtype"]], tuple(entry["shape"])

    def _config(self) -> dict[str, Any]:
        params, shards = self.params, len(self._shards)
        (rows, dim), (ffn, _) = (self._entry(name)[1] for name in ("output.weight", "layers.0.feed_forward.w1.weight"))
        return {
            "architectures": ["ChameleonForConditionalGeneration"],
            "model_type": "chameleon",
            "vocab_size": rows * shards,
            "hidden_size": dim,
            "intermediate_size": ffn * shards,
            "num_hidden_layers": params["n_layers"],
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 4096,  # Chameleon 2.3
            "rms_norm_eps": params["norm_eps"],
            "rope_parameters": {"rope_type": "default", "rope_theta": params.get("rope_theta", 10000.0)},
            "swin_norm": bool(params.get("swin_norm", False)),
            "tie_word_embeddings": False,
            "model_parallel_size": shards,
        } | self._vocabulary_map()

    def _vocabulary_map(self) -> dict[str, Any]:
        """Names and ids from the release's tokenizer, two folders up; nothing where it is not there."""
        path = self.folder.parent.parent / "tokenizer" / "text_tokenizer.json"
        if not path.is_file():
            return {}
        ids = read_json(path, error=CheckpointError)["model"]["vocab"]
        with suppress(KeyError):
            ids["<image>"] = ids.pop("<reserved08707>")  # transformers' placeholder takes a free slot
        return {"vocabulary_map": ids}

    def _tensors(self) -> dict[str, tuple[str, torch.dtype, tuple[int, ...]]]:
        names = {**_TOP}
        for i in range(self.params["n_layers"]):
            names |= {f"model.layers.{i}.{hf}": (f"layers.{i}.{meta}", dim) for hf, (meta, dim) in _FORMS.items()}
        tensors = {}
        for hf, (meta, dim) in names.items():
            dtype, shape = self._entry(meta)
            if "_norm." in hf and ".self_attn." in hf:
                shape = (self.heads if ".q_norm." in hf else self.kv_heads, self.size)
            elif dim is not None:
                shape = tuple(n * len(self._shards) if i == dim else n for i, n in enumerate(shape))
            tensors[hf] = (meta, dtype, shape)
        return tensors

    def _parts(self, meta: str) -> list[torch.Tensor]:
        parts = []
        for shard, file in enumerate(self._shards):
            shape = self._entry(meta, shard)[1]
            parts.append(self._files.slice(file, meta, whole(shape).within(whole(shape))))
        return parts

    def raw(self, meta: str, dim: int | None) -> torch.Tensor:
        """A tensor under Meta's name, its shards joined; norms that every shard has are averaged."""
        parts = self._parts(meta)
        return torch.stack(parts).mean(0) if dim is None else torch.cat(parts, dim)

    @lru_cache(maxsize=1)  # noqa: B019 - reads go through a tensor row by row; the folder lives as long as the import
    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor in transformers' form."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return self.raw(*_TOP[name])
        meta, dim = _FORMS[match[2]]
        meta = f"layers.{match[1]}.{meta}"
        heads = self.kv_heads if ".k_" in name else self.heads
        if "_norm." in name and ".self_attn." in name:
            rows = torch.stack([half_split(part[:, None], 1)[:, 0] for part in self._parts(meta)])
            return rows.repeat_interleave(heads // len(self._shards), 0)
        joined = self.raw(meta, dim)
        return half_split(joined, heads) if ".q_proj." in name or ".k_proj." in name else joined

    def read(self, name: str, box: Box, out: torch.Tensor) -> None:
        """As in `Source`."""
        out.copy_(self.tensor(name)[box.within(whole(self.tensors[name][2]))])


def half_split(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads * D, n] whose rotary pairs are neighbours (2i, 2i + 1) -> pairs half a head apart (i, i + D/2)."""
    size = rows.shape[0] // heads
    return rows.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


@torch.no_grad()
def meta_logits(source: MetaFolder, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """fp32 logits of Meta's own form, layer by layer: with interleaved rotary pairs and a norm for each shard, so that
    it shares nothing with the conversion that it checks."""
    embed = source.raw("tok_embeddings.weight", 1).float()
    hidden = [embed[batch] for batch in batches]
    for i in range(source.params["n_layers"]):
        hidden = [_layer(source, f"layers.{i}.", x) for x in hidden]
    norm, output = source.raw("norm.weight", None).float(), source.raw("output.weight", 0).float()
    eps = source.params["norm_eps"]
    return [F.rms_norm(x, norm.shape, norm, eps) @ output.T for x in hidden]


def _layer(source: MetaFolder, prefix: str, x: torch.Tensor) -> torch.Tensor:
    def norm(name: str, value: torch.Tensor) -> torch.Tensor:
        weight = source.raw(f"{prefix}{name}.weight", None).float()
        return F.rms_norm(value, weight.shape, weight, source.params["norm_eps"])

    def feed(value: torch.Tensor) -> torch.Tensor:
        w1, w3 = (source.raw(f"{prefix}feed_forward.{name}.weight", 0).float() for name in ("w1", "w3"))
        return (F.silu(value @ w1.T) * (value @ w3.T)) @ source.raw(f"{prefix}feed_forward.w2.weight", 1).float().T

    if source.params.get("swin_norm"):
        x = x + norm("attention_norm", _attention(source, prefix, x))
        return x + norm("ffn_norm", feed(x))
    x = x + _attention(source, prefix, norm("attention_norm", x))
    return x + feed(norm("ffn_norm", x))


def _attention(source: MetaFolder, prefix: str, x: torch.Tensor) -> torch.Tensor:
    batch, length, _ = x.shape
    size, shards = source.size, len(source._shards)

    def projected(name: str, heads: int) -> torch.Tensor:
        return (x @ source.raw(f"{prefix}attention.w{name}.weight", 0).float().T).view(batch, length, heads, size)

    def normed(name: str, value: torch.Tensor) -> torch.Tensor:
        weights, biases = (
            source._parts(f"{prefix}attention.{name}_normalization.{kind}") for kind in ("weight", "bias")
        )
        of_shard = value.chunk(shards, dim=2)
        out = [
            F.layer_norm(v, (size,), w.float(), b.float()) for v, w, b in zip(of_shard, weights, biases, strict=True)
        ]
        return turned(torch.cat(out, dim=2))

    def turned(value: torch.Tensor) -> torch.Tensor:
        theta = float(source.params.get("rope_theta", 10000.0))
        angle = torch.outer(torch.arange(length), theta ** -(torch.arange(0, size, 2) / size))
        pairs = torch.view_as_complex(value.reshape(*value.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[None, :, None]).flatten(3)

    q, k = normed("q", projected("q", source.heads)), normed("k", projected("k", source.kv_heads))
    v = projected("v", source.kv_heads)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(2) @ source.raw(f"{prefix}attention.wo.weight", 1).float().T
