"""RMSNorm and SwiGLU against autograd through the plain formula."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from megacm3.model.functions import rms_norm, swiglu


def plain_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


@pytest.mark.parametrize("shape, weight_shape", [((5, 3, 16), (16,)), ((5, 3, 4, 8), (8,)), ((5, 3, 4, 8), (4, 8))])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_rms_norm(shape: tuple[int, ...], weight_shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(weight_shape, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator).to(dtype)
    out = rms_norm(x, weight, 1e-5)
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = plain_rms_norm(x64, weight64)
    results = (out, *torch.autograd.grad(out, (x, weight), grad))
    references = (expected, *torch.autograd.grad(expected, (x64, weight64), grad.double()))
    for mine, reference in zip(results, references, strict=True):
        assert mine.dtype == dtype and mine.shape == reference.shape
        error = (mine.detach().double() - reference.detach()).norm() / reference.detach().norm()
        assert float(error) < tolerance


def test_rms_norm_of_a_view_that_is_not_contiguous() -> None:
    x = torch.randn(6, 4, 8).transpose(0, 1)
    torch.testing.assert_close(rms_norm(x, torch.ones(8), 1e-5), plain_rms_norm(x, torch.ones(8)))


def test_swiglu() -> None:
    inner = torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True)
    gate, up = inner.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(inner), F.silu(gate) * up)
    assert gradcheck(swiglu, (inner,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_inputs_are_kept(dtype: torch.dtype) -> None:
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        x = torch.randn(64, 32, dtype=dtype, requires_grad=True)
        y = rms_norm(x, torch.ones(32, dtype=dtype, requires_grad=True), 1e-5)
        assert sorted(kept) == [32, 64, x.numel()]
        kept.clear()
        swiglu(y)
        assert kept == [y.numel()]
