"""The learning rate is a pure function of the step."""

import pytest

from megacm3.resolve import load_config
from megacm3.training.schedule import learning_rate

BASE = ["model.preset=tiny_cm3leon", "train.steps=110", "optimizer.lr=1.0"]


def _rates(kind: str, warmup: int = 10, final: float = 0.1) -> list[float]:
    given = [
        f"optimizer.schedule.{key}={value}" for key, value in (("kind", kind), ("warmup", warmup), ("final", final))
    ]
    config = load_config(None, BASE + given)
    return [learning_rate(config, step) for step in range(111)]


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(kind: str) -> None:
    rates = _rates(kind)
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("kind", "half", "end"), [("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_middle_and_end_of_the_decay(kind: str, half: float, end: float) -> None:
    rates = _rates(kind)
    assert rates[60] == pytest.approx(half)
    assert rates[110] == pytest.approx(end)


def test_exponential_falls_by_equal_factors() -> None:
    rates = _rates("exponential", final=0.01)
    assert rates[110] == pytest.approx(0.01)
    assert rates[60] == pytest.approx(0.1)
    assert rates[61] / rates[60] == pytest.approx(rates[11] / rates[10])


def test_no_warm_up_starts_at_the_peak_and_never_leaves_the_end() -> None:
    rates = _rates("linear", warmup=0)
    assert rates[0] == 1.0
    config = load_config(None, [*BASE, "optimizer.schedule.warmup=0"])
    assert learning_rate(config, 10_000) == learning_rate(config, 110)
