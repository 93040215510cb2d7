"""The gradient norm of stage 0."""

import torch

from megacm3.parallel.optimizer import _square_sum


def test_square_sum_of_a_large_tensor_keeps_seven_digits() -> None:
    """Summed in fp32 alone, the norm of so many numbers is wrong in the third digit."""
    tensor = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = float(tensor.double().square().sum())
    assert abs(float(_square_sum(tensor)) - exact) < 1e-6 * exact
    assert abs(float(torch.linalg.vector_norm(tensor)) ** 2 - exact) > 1e-4 * exact


def test_square_sum_of_bf16_and_of_a_view() -> None:
    tensor = torch.randn(300, 7).bfloat16()
    exact = tensor.double().square().sum()
    torch.testing.assert_close(_square_sum(tensor), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(_square_sum(tensor.T), exact, rtol=1e-6, atol=0)
