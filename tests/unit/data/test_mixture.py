"""Which document is sample number g."""

import numpy as np
import pytest

from megacm3.data.mixture import PERIOD, Mixture, Stage, apportion, balanced_weights, capped_weights, limit_epochs
from megacm3.errors import ConfigError


def test_one_store_is_permuted_anew_in_every_epoch() -> None:
    mixture = Mixture([50], [Stage(0, (1.0,))], seed=3)
    stores, documents, epochs = mixture.lookup(0, 200)
    assert stores.tolist() == [0] * 200
    assert epochs.tolist() == [e for e in range(4) for _ in range(50)]
    rows = documents.reshape(4, 50)
    assert all(np.array_equal(np.sort(row), np.arange(50)) for row in rows)
    assert len({tuple(row) for row in rows.tolist()}) == 4


def test_any_sample_is_found_without_those_before_it() -> None:
    mixture = Mixture([50, 7], [Stage(0, (0.7, 0.3))], seed=0)
    everything = mixture.lookup(0, 3000)
    for first in (0, 1, 999, 2990):
        for whole, part in zip(everything, mixture.lookup(first, 10), strict=True):
            assert np.array_equal(whole[first : first + 10], part)


def test_weights_are_shares_of_the_documents_drawn() -> None:
    mixture = Mixture([1000, 1000, 10], [Stage(0, (5, 3, 2))], seed=0)
    stores, _, _ = mixture.lookup(0, PERIOD)
    assert np.allclose(np.bincount(stores) / PERIOD, [0.5, 0.3, 0.2], atol=1e-4)
    # And locally: stores are mixed, not one after another.
    local = np.bincount(stores[:1000], minlength=3) / 1000
    assert abs(local - [0.5, 0.3, 0.2]).max() < 0.06


def test_every_document_comes_once_an_epoch_in_a_mixture() -> None:
    mixture = Mixture([40, 60], [Stage(0, (1, 2))], seed=5)
    stores, documents, epochs = mixture.lookup(0, 5000)
    for store, size in ((0, 40), (1, 60)):
        rows = documents[(stores == store)]
        whole = rows[: len(rows) // size * size].reshape(-1, size)
        assert all(np.array_equal(np.sort(row), np.arange(size)) for row in whole)
        assert np.array_equal(epochs[stores == store], np.arange(len(rows)) // size)


def test_crossing_the_period_goes_on_counting() -> None:
    mixture = Mixture([1 << 20, 1 << 20], [Stage(0, (0.25, 0.75))], seed=1)
    stores, documents, _ = mixture.lookup(PERIOD - 500, 1000)
    drawn = [documents[stores == store] for store in (0, 1)]
    assert all(len(np.unique(row)) == len(row) for row in drawn)


def test_stages_change_the_weights_and_go_on_with_the_stores() -> None:
    # Chameleon: the last fifth with the first weights halved and high-quality sets added.
    first = 70_000
    stages = [Stage(0, (1.0, 0.0)), Stage(first, (0.5, 0.5))]
    mixture = Mixture([200_000, 300], stages, seed=0)
    before = mixture.lookup(first - 1000, 1000)
    after = mixture.lookup(first, 1000)
    assert set(before[0].tolist()) == {0}
    assert 0.4 < (after[0] == 1).mean() < 0.6
    # No document of the first store comes again before its epoch ends.
    seen = mixture.lookup(0, first)[1]
    again = np.intersect1d(seen, after[1][after[0] == 0])
    assert len(seen) == len(np.unique(seen)) and len(again) == 0
    assert mixture.passes(first) == [first / 200_000, 0.0]
    assert mixture.passes(first + 2 * PERIOD)[1] == PERIOD / 300


def test_passes_count_what_was_drawn() -> None:
    mixture = Mixture([50, 7], [Stage(0, (0.7, 0.3))], seed=0)
    stores, _, _ = mixture.lookup(0, 777)
    assert mixture.passes(777) == [(stores == 0).sum() / 50, (stores == 1).sum() / 7]


def test_apportion() -> None:
    assert apportion([1, 1, 2], 8) == [2, 2, 4]
    assert sum(apportion([0.1, 0.2, 0.7], 65536)) == 65536
    # A very small weight is still drawn.
    places = apportion([1, 1e-9, 0], 1000)
    assert places == [999, 1, 0]
    for wrong in ([], [0, 0], [1, -1], [float("nan")]):
        with pytest.raises(ConfigError, match=r"data\.mixture"):
            apportion(wrong, 10)


def test_caps_of_the_fine_tuning_mixture() -> None:
    # 100 of 1,000 documents asked for at half of all draws: at most three times its part.
    assert np.allclose(capped_weights([1.0, 1.0], [100, 900], up=3.0, down=0.3), [0.3, 0.7])
    # The large store may not fall below 0.3 of its part; the small one takes no more than three times its own.
    assert np.allclose(capped_weights([0.01, 0.99], [900, 100], up=3.0, down=0.3), [0.7, 0.3])
    assert capped_weights([1.0, 0.0], [10, 90], up=3.0, down=0.3) == [1.0, 0.0]
    assert np.allclose(capped_weights([1.0, 3.0], [10, 90]), [1.0, 3.0])
    with pytest.raises(ConfigError, match=r"data\.upsample = 0\.5"):
        capped_weights([1.0, 1.0], [1, 1], up=0.5)


def test_the_caps_hold_for_what_is_drawn() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = rng.integers(1, 9)
        sizes = (10 ** rng.uniform(0, 6, count)).astype(int) + 1
        weights = rng.uniform(0, 1, count) * (rng.random(count) < 0.8)
        weights[0] += 0.01
        shares = np.array(capped_weights(weights, sizes, up=3.0, down=0.3))
        natural = np.where(weights > 0, sizes, 0) / sizes[weights > 0].sum()
        assert abs(shares.sum() - 1) < 1e-9 and (shares[weights == 0] == 0).all()
        assert (shares <= 3 * natural + 1e-9).all() and (shares >= 0.3 * natural - 1e-9).all()
        free = (shares < 3 * natural - 1e-9) & (shares > 0.3 * natural + 1e-9)
        if free.any():
            # Between the stores that no bound holds, the weights' ratios stay.
            assert np.ptp(shares[free] / weights[free]) < 1e-6 * (shares[free] / weights[free]).max()


def test_modalities_are_balanced() -> None:
    weights = balanced_weights([8.0, 1.0, 1.0], [0.0, 1.0, 1.0], 0.5)
    assert np.allclose(np.array(weights) / sum(weights), [0.5, 0.25, 0.25])
    pictures = np.array([0.1, 0.9, 0.5, 0.0])
    for target in (0.2, 0.5, 0.7):
        weights = np.array(balanced_weights([1.0, 2.0, 3.0, 4.0], pictures, target))
        assert np.isclose(weights @ pictures / weights.sum(), target) and (weights >= 0).all()
    with pytest.raises(ConfigError, match=r"data\.image_answers = 0\.5: .* are 0\.00 to 0\.00"):
        balanced_weights([1.0, 1.0], [0.0, 0.0], 0.5)


def test_passes_are_limited_by_lowering_the_weight() -> None:
    shares = limit_epochs([1.0, 1.0], [100, 10_000], [2.0, 0.0], draws=1000)
    assert np.allclose(shares, [0.2, 0.8])
    assert np.allclose(limit_epochs([1.0, 3.0], [10, 10], [0, 0], draws=1000), [0.25, 0.75])
    # What one gives up may push another one to its limit.
    shares = limit_epochs([1.0, 1.0, 1.0], [100, 400, 10_000], [1.0, 1.0, 0.0], draws=1000)
    assert np.allclose(shares, [0.1, 0.4, 0.5])
    with pytest.raises(ConfigError, match=r"draws 1000 documents, but the epochs of data\.mixture allow 300"):
        limit_epochs([1.0, 1.0], [100, 100], [2.0, 1.0], draws=1000)


def test_a_weight_on_an_empty_store_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.mixture\[1\] has weight 1\.0 but no documents"):
        Mixture([5, 0], [Stage(0, (1.0, 1.0))], seed=0)
