"""Which kernels are chosen, with the machine given as data; and that what runs here gives the plain results."""

import logging
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch

from megacm3.config import Config
from megacm3.model.functions import rotate, swiglu
from megacm3.model.kernels import PLAIN, Capabilities, capabilities, choose, elementwise, fused_attention, norms

FULL = Capabilities((9, 0), apex=True, transformer_engine=True, triton=True)
BARE = Capabilities((9, 0))


@pytest.fixture
def config(configure: Callable[..., Config]) -> Callable[..., Config]:
    return lambda *overrides: configure("tiny_chameleon_7b", "train.dtype=bf16", *overrides)


@pytest.mark.parametrize(
    "found, overrides, attention, norm, compiled",
    [
        (Capabilities(None), (), "torch", "own", "none"),
        # Packages for CUDA are of no use without a device.
        (Capabilities(None, apex=True, transformer_engine=True, triton=True), (), "torch", "own", "none"),
        (FULL, (), "transformer_engine", "apex", "elementwise"),
        (BARE, (), "torch", "torch", "none"),
        (FULL, ("data.document_mask=true",), "torch", "apex", "elementwise"),
        (FULL, ("train.dtype=fp32",), "torch", "apex", "elementwise"),
        (Capabilities((7, 5), transformer_engine=True, triton=True), (), "torch", "torch", "elementwise"),
        (Capabilities((6, 1), triton=True), (), "torch", "torch", "none"),
    ],
)
def test_choice(
    config: Callable[..., Config],
    found: Capabilities,
    overrides: tuple[str, ...],
    attention: str,
    norm: str,
    compiled: str,
) -> None:
    kernels = choose(found, config(*overrides))
    assert (kernels.attention.name, kernels.norm.name, kernels.compiled.name) == (attention, norm, compiled)
    assert kernels.adam.name == "torch"
    assert kernels.overlap.name == ("on" if found.cuda else "off")


def test_every_choice_is_told_with_its_reason(config: Callable[..., Config], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        choose(BARE, config()).report()
    assert len(caplog.messages) == len(fields(PLAIN))
    assert "kernels: attention = torch (TransformerEngine is not installed" in caplog.messages[0]


def test_reasons_name_the_key_that_decided(config: Callable[..., Config]) -> None:
    assert "data.document_mask" in choose(FULL, config("data.document_mask=true")).attention.reason
    assert "train.dtype" in choose(FULL, config("train.dtype=fp32")).attention.reason


def test_the_cpu_takes_the_plain_path(config: Callable[..., Config]) -> None:
    assert choose(capabilities(torch.device("cpu")), config()) == PLAIN
    assert fused_attention(PLAIN, 4, 2, 16) is None
    assert elementwise(PLAIN) == (swiglu, rotate)


def test_norms_of_torch_equal_our_own(config: Callable[..., Config]) -> None:
    x, weight = torch.randn(5, 2, 16), torch.randn(16)
    own, bare = norms(PLAIN), norms(choose(BARE, config()))
    torch.testing.assert_close(own[0](x, weight, 1e-5), bare[0](x, weight, 1e-5))
    torch.testing.assert_close(own[1](x, 1e-5), bare[1](x, 1e-5))


@pytest.mark.long
def test_compiled_pieces_give_the_plain_results(config: Callable[..., Config]) -> None:
    """The compiler runs on the CPU too: values and gradients of what a GPU would compile."""
    for plain, compiled in zip(elementwise(PLAIN), elementwise(choose(FULL, config())), strict=True):
        inputs = [torch.randn(6, 2, 16, requires_grad=True)]
        inputs += [torch.randn(6, 1, 16) for _ in range(2)] if plain is rotate else []
        results = []
        for function in (plain, compiled):
            out = function(*inputs)
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs[0])))
        for mine, expected in zip(*results, strict=True):
            torch.testing.assert_close(mine, expected)
