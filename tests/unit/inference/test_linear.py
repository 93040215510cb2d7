"""Int8 weights: exact on what they can hold, close on a model, refused where there is no kernel."""

import pytest
import torch

from megacm3.errors import ConfigError
from megacm3.inference.decoder import Decoder
from megacm3.inference.linear import Int8Weight, linear


def test_values_that_int8_holds_come_back():
    scale = torch.tensor([0.5, 2.0, 0.125])
    values = torch.randint(-127, 128, (3, 64), generator=torch.Generator().manual_seed(0))
    values[:, 0] = 127
    weight = Int8Weight(values * scale[:, None])
    assert weight.values.equal(values.to(torch.int8)) and weight.scale.allclose(scale)
    x = torch.eye(64)[:7].view(1, 7, 64)
    torch.testing.assert_close(linear(x, weight), linear(x, values * scale[:, None]), rtol=5e-3, atol=0)


def test_rows_of_zeros_and_any_shape():
    weight = torch.randn(40, 32)
    weight[3] = 0
    out = linear(torch.randn(2, 5, 32), Int8Weight(weight))
    assert out.shape == (2, 5, 40) and out.dtype == torch.float32 and (out[..., 3] == 0).all()


def test_a_model_with_int8_weights_is_close(models):
    tokens = torch.randint(0, 380, (2, 20), generator=torch.Generator().manual_seed(1))
    for family in ("opt", "qwen3"):
        folder = models[family][1]
        exact, rounded = Decoder.load(folder), Decoder.load(folder, int8=True)
        expected = exact.logits(exact.forward(tokens, [0, 0], exact.cache(2, 20)))
        found = rounded.logits(rounded.forward(tokens, [0, 0], rounded.cache(2, 20)))
        assert 0 < (found - expected).norm() / expected.norm() < 0.05


def test_other_devices_are_refused():
    with pytest.raises(ConfigError, match="int8 weights run on the CPU only"):
        Int8Weight(torch.zeros(2, 2, device="meta"))


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 64, 65])
def test_any_number_of_rows_gives_the_same_product(rows):
    x, weight = torch.randn(rows, 2, 48), torch.randn(96, 48)
    out = linear(x, weight[8:72])
    torch.testing.assert_close(out, x @ weight[8:72].t(), rtol=1e-5, atol=1e-5)
    assert out.shape == (rows, 2, 64)
    torch.testing.assert_close(linear(x[:1, 1:], weight[8:72]), out[:1, 1:], rtol=1e-5, atol=1e-5)  # one row
