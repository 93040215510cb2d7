"""The papers' formulas and the properties that must hold between them."""

import itertools

import pytest
import torch

from megacm3.errors import ConfigError
from megacm3.inference.guidance import ClassifierFree, Contrastive, Plain, ThreeStream, choose_guidance


def logits(streams, seed=0):
    return 4 * torch.randn(5, streams, 40, generator=torch.Generator().manual_seed(seed))


def test_scale_1_is_conditional_and_0_unconditional_to_the_bit():
    block = logits(2)
    assert ClassifierFree(1)(block).equal(block[:, 0])
    assert ClassifierFree(0)(block).equal(block[:, 1])


def test_two_streams_is_the_papers_formula():
    block = logits(2)
    conditional, unconditional = block.unbind(1)
    torch.testing.assert_close(ClassifierFree(3.5)(block), unconditional + 3.5 * (conditional - unconditional))


def test_three_streams_is_the_papers_formula():
    block = logits(3)
    full, image, nothing = block.unbind(1)
    expected = nothing + 1.5 * (image - nothing) + 7.5 * (full - image)
    torch.testing.assert_close(ThreeStream(1.5, 7.5)(block), expected, atol=1e-4, rtol=1e-5)


def test_three_streams_without_pictures_is_two():
    """A prompt without pictures has image stream = unconditional stream: the image scale drops out."""
    block = logits(2)
    three = torch.stack((block[:, 0], block[:, 1], block[:, 1]), 1)
    torch.testing.assert_close(ThreeStream(1.2, 3.0)(three), ClassifierFree(3.0)(block), atol=1e-4, rtol=1e-5)


def contrastive_by_the_paper(block, k, alpha):
    expert, amateur = block.softmax(-1).unbind(1)
    border = alpha * expert.sort(-1, descending=True).values[:, k - 1 : k]
    return torch.where(expert >= border, expert.log() - amateur.log(), float("-inf"))


@pytest.mark.parametrize(("k", "alpha"), [(1, 0.5), (3, 0.5), (8, 0.1), (40, 0.9)])
def test_contrastive_is_equation_3(k, alpha):
    block = logits(2)
    torch.testing.assert_close(
        Contrastive(k, alpha)(block), contrastive_by_the_paper(block, k, alpha), atol=1e-4, rtol=1e-4
    )


def test_k_1_is_plain_cd():
    block = logits(2)
    expert = block[:, 0].softmax(-1)
    kept = Contrastive(1, 0.3)(block).isfinite()
    assert kept.equal(expert >= 0.3 * expert.max(-1, keepdim=True).values)


def test_larger_k_keeps_more_and_k_beyond_the_candidates_is_the_last():
    block = logits(2)
    kept = [Contrastive(k, 0.5)(block).isfinite() for k in (1, 2, 5, 40)]
    for fewer, more in itertools.pairwise(kept):
        assert (fewer <= more).all()
    assert Contrastive(1000, 0.5)(block).equal(Contrastive(40, 0.5)(block))


def test_alpha_0_is_the_pure_difference_and_alpha_1_the_best_token():
    block = logits(2)
    expert, amateur = block.log_softmax(-1).unbind(1)
    torch.testing.assert_close(Contrastive(1, 0)(block), expert - amateur)
    assert Contrastive(1, 1)(block).isfinite().sum(-1).tolist() == [1] * 5


def test_equal_streams_give_a_uniform_choice():
    block = logits(2)
    block[:, 1] = block[:, 0]
    values = Contrastive(4, 0.2)(block)
    assert values[values.isfinite()].abs().max() < 1e-5


def test_masked_candidates_stay_masked():
    block = logits(3)
    block[:, :, 7] = float("-inf")
    for guidance, streams in ((Plain(), 1), (Contrastive(3, 0.5), 2)):
        assert (guidance(block[:, :streams])[:, 7] == float("-inf")).all()


def test_temperatures_of_the_public_script():
    block = logits(2)
    block[:, 1] /= 2
    expected = Contrastive(2, 0.5)(torch.stack((block[:, 0] / 0.8, block[:, 1] / 0.5), 1))
    torch.testing.assert_close(Contrastive(2, 0.5, 0.8, 0.5)(block), expected)


def test_choice_of_a_user():
    assert choose_guidance() == ClassifierFree(3.0)
    assert choose_guidance(1) == Plain()
    assert choose_guidance(contrastive_k=4) == Contrastive(4, 0.5)
    assert choose_guidance(contrastive_alpha=0.2) == Contrastive(1, 0.2)
    with pytest.raises(ConfigError, match="exclude"):
        choose_guidance(3.0, contrastive_k=2)
    with pytest.raises(ConfigError, match="k is 0"):
        choose_guidance(contrastive_k=0)
    with pytest.raises(ConfigError, match="alpha is 2"):
        choose_guidance(contrastive_alpha=2)
