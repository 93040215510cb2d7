"""One transformer block, in both norm orders, with recomputation."""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from megacm3.config import Config
from megacm3.model.kernels import PLAIN, Kernels
from megacm3.model.layers import Attention, FeedForward, KeyedDropout, Norm, Rotary
from megacm3.parallel.context import ParallelContext


class Block(torch.nn.Module):
    """pre: x + f(norm(x)), CM3Leon and Chameleon 7B; swin: x + norm(f(x)), Chameleon 34B (Chameleon 2.3)."""

    def __init__(
        self, index: int, config: Config, context: ParallelContext, linear: Any, kernels: Kernels = PLAIN
    ) -> None:
        super().__init__()
        model, name = config.model, f"layers.{index}"
        dtype, seed = linear.params_dtype, config.train.seed
        self.swin = model.norm_order == "swin"
        self.recompute = config.parallel.recompute == "full"
        self.document_mask, self.position_reset = config.data.document_mask, config.data.position_reset
        self.attn_norm = Norm(f"{name}.attn_norm", model, context, dtype, kernels)
        self.attn = Attention(f"{name}.attn", config, context, linear, kernels)
        self.mlp_norm = Norm(f"{name}.mlp_norm", model, context, dtype, kernels)
        self.mlp = FeedForward(f"{name}.mlp", config, context, linear, kernels)
        self.attn_dropout = KeyedDropout(model.dropout, f"{name}.attn", seed, context)
        self.mlp_dropout = KeyedDropout(model.dropout, f"{name}.mlp", seed, context)
        self.rotary = Rotary(model, context.device, kernels) if model.positions == "rope" else None

    def _block(self, x_SBH: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
        numbers_B, documents_BT, _ = unpack(meta)
        mask = document_mask(documents_BT) if self.document_mask else None
        positions = positions_in_document(documents_BT) if self.position_reset else None
        if self.swin:
            h = self.attn_norm(self.attn(x_SBH, self.rotary, mask, positions))
        else:
            h = self.attn(self.attn_norm(x_SBH), self.rotary, mask, positions)
        x_SBH = x_SBH + self.attn_dropout(h, numbers_B)
        h = self.mlp_norm(self.mlp(x_SBH)) if self.swin else self.mlp(self.mlp_norm(x_SBH))
        return x_SBH + self.mlp_dropout(h, numbers_B)

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden [S, B, H], meta) -> the same; meta as packed by `pack`."""
        x_SBH, meta = inputs
        if self.recompute and torch.is_grad_enabled():
            x_SBH = checkpoint(self._block, x_SBH, meta, use_reentrant=False, preserve_rng_state=False)
        else:
            x_SBH = self._block(x_SBH, meta)
        return x_SBH, meta


def pack(numbers_B: torch.Tensor, documents_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """What rides beside the activations through all stages, int64 [B, 1 + 2T]: number | documents | targets."""
    return torch.cat((numbers_B[:, None].long(), documents_BT.long(), targets_BT.long()), dim=1)


def unpack(meta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sequence numbers [B], documents [B, T], targets [B, T])."""
    length = (meta.shape[1] - 1) // 2
    return meta[:, 0], meta[:, 1 : 1 + length], meta[:, 1 + length :]


def document_mask(documents_BT: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, T, T]: causal, and only within a document."""
    same = documents_BT[:, :, None] == documents_BT[:, None, :]
    return same.tril()[:, None]


def positions_in_document(documents_BT: torch.Tensor) -> torch.Tensor:
    """int64 [B, T]: position since the document's first token."""
    place = torch.arange(documents_BT.shape[1], device=documents_BT.device).expand_as(documents_BT)
    starts = torch.ones_like(documents_BT, dtype=torch.bool)
    starts[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    first = torch.where(starts, place, torch.zeros_like(place)).cummax(dim=1).values
    return place - first
