"""Filters against transformers' own, noise that is truly Gumbel and a function of its key alone."""

import math

import pytest
import torch

from megacm3.errors import ConfigError
from megacm3.inference.sampling import Sampling, draw, gumbel_noise, keep, penalize


def ints(*values):
    return torch.tensor(values)


def scores(rows=4, width=50, seed=0):
    return 3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 0.9), (1.3, 5, 1.0), (1.0, 10, 0.5), (1, 0, 0.01)]
)
def test_filters_equal_transformers(temperature, top_k, top_p):
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    torch.testing.assert_close(
        keep(scores(), Sampling(temperature, top_k, top_p)), warpers(torch.zeros(4, 1, dtype=torch.long), scores())
    )


def test_top_p_over_a_flat_distribution_takes_the_slow_way_and_is_right():
    from transformers import TopPLogitsWarper

    flat = torch.linspace(0, -0.1, 1000).expand(2, -1)
    kept = keep(flat, Sampling(top_p=0.5)).isfinite()
    assert kept.equal(TopPLogitsWarper(0.5)(torch.zeros(2, 1, dtype=torch.long), flat).isfinite())
    assert 480 < kept[0].sum() < 500


def test_a_draw_does_not_hang_on_the_way_its_batch_takes():
    """Logits in bf16 have many equals. A row that needs the sorted vocabulary takes its batch with it."""
    width, sampling = 512, Sampling(top_p=0.1)
    coarse = torch.randn(1, width, generator=torch.Generator().manual_seed(1)).mul(2).round().div(2)
    ids = torch.arange(width)
    for position in range(40):
        places = torch.full((30,), position)
        rows, seeds = coarse.expand(30, -1), torch.arange(30)
        together = draw(rows, sampling, seeds, places, ids)
        alone = [draw(coarse, sampling, seeds[i : i + 1], places[:1], ids).item() for i in range(30)]
        assert together.tolist() == alone


def test_repetition_penalty_equals_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    seen = [3, 7, 7, 9]
    expected = RepetitionPenaltyLogitsProcessor(1.2)(torch.tensor([seen]), scores(1))[0]
    torch.testing.assert_close(penalize(scores(1)[0], seen, 1.2), expected)
    assert penalize(scores(1)[0], [], 1.2).equal(scores(1)[0])


def test_noise_depends_on_its_key_only():
    ids = torch.arange(64)
    one = gumbel_noise(ints(5), ints(3), ids)
    many = gumbel_noise(ints(9, 5, 5), ints(3, 4, 3), ids)
    assert many[2].equal(one[0])  # whatever else is in the batch
    assert gumbel_noise(ints(5), ints(3), ids[10:20]).equal(one[:, 10:20])  # whatever else is a candidate
    assert not many[1].equal(one[0]) and not many[0].equal(one[0])


def test_noise_is_gumbel_distributed_and_uncorrelated():
    noise = gumbel_noise(torch.arange(200), torch.zeros(200, dtype=torch.long), torch.arange(500)).double()
    assert abs(noise.mean() - 0.5772) < 0.02
    assert abs(noise.var() - math.pi**2 / 6) < 0.03
    centred = (noise - noise.mean()) / noise.std()
    assert (centred @ centred.T / 500 - torch.eye(200)).fill_diagonal_(0).abs().max() < 0.3
    assert abs((centred[:, 1:] * centred[:, :-1]).mean()) < 0.02
    large = gumbel_noise(ints((1 << 63) - 1, 0), ints(4095, 0), torch.arange(65536))
    assert large.isfinite().all()


def test_draws_follow_the_softmax():
    row = torch.tensor([[2.0, 1.0, 0.0, float("-inf"), -1.0]]).expand(20000, -1)
    drawn = draw(row, Sampling(), torch.arange(20000), torch.zeros(20000, dtype=torch.long), torch.arange(5))
    share = torch.bincount(drawn, minlength=5) / 20000
    torch.testing.assert_close(share, row[0].softmax(-1), atol=0.015, rtol=0)
    assert share[3] == 0


def test_temperature_zero_takes_the_best():
    drawn = draw(scores(), Sampling(temperature=0), torch.arange(4), torch.arange(4), torch.arange(50))
    assert drawn.equal(scores().argmax(-1))


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"repetition_penalty": 0}]
)
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Sampling(**bad)


@pytest.mark.parametrize(("top_p", "scale"), [(0.9, 1.0), (0.9, 0.0), (0.3, 0.2), (0.01, 3.0), (0.999, 8.0)])
def test_the_nucleus_is_found_without_sorting(top_p, scale):
    """The same token as from the sorted vocabulary; a small nucleus of a flat distribution needs the sort."""
    generator = torch.Generator().manual_seed(1)
    many = scale * torch.randn(300, 500, generator=generator) + 1e-4 * torch.randn(300, 500, generator=generator)
    seeds, positions, ids = torch.arange(300), torch.full((300,), 7), torch.arange(500)
    for sampling in (Sampling(0.8, 0, top_p), Sampling(1.2, 40, top_p)):
        expected = (keep(many, sampling) + gumbel_noise(seeds, positions, ids)).argmax(-1)
        assert draw(many, sampling, seeds, positions, ids).equal(expected)
        alone = torch.cat([draw(many[i : i + 1], sampling, seeds[i : i + 1], positions[:1], ids) for i in range(20)])
        assert alone.equal(expected[:20])
