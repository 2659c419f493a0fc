"""Learning rate schedules against their formulas."""

import math

import pytest

from transformer_ext.training.schedules import SCHEDULES, Schedule


@pytest.mark.parametrize("step", [1, 10, 3999, 4000, 4001, 100_000])
def test_noam_is_the_formula_of_the_paper(step: int) -> None:
    schedule = Schedule("noam", 1.0, 4000, 100_000, d_model=512)
    assert schedule(step) == pytest.approx(512**-0.5 * min(step**-0.5, step * 4000**-1.5))


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "noam"])
def test_rises_linearly_to_the_peak(name: str) -> None:
    schedule = Schedule(name, 2e-3, 100, 1000)
    assert schedule(1) == pytest.approx(2e-5)
    assert schedule(50) == pytest.approx(1e-3)
    assert schedule(100) == pytest.approx(2e-3)


def test_ends() -> None:
    assert Schedule("linear", 1.0, 100, 1100)(600) == pytest.approx(0.5)
    assert Schedule("linear", 1.0, 100, 1100)(1100) == 0.0
    assert Schedule("linear", 1.0, 100, 1100, 0.1)(5000) == pytest.approx(0.1)
    assert Schedule("cosine", 1.0, 0, 1000)(250) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert Schedule("cosine", 1.0, 0, 1000, 0.2)(1000) == pytest.approx(0.2)
    assert Schedule("inverse_sqrt", 1.0, 100, 1000)(400) == pytest.approx(0.5)
    assert Schedule("constant", 0.3, 0, 10)(10**6) == 0.3


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"name": "cosin"}, "cosine"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"total_steps": 0}, "max_steps"),
        ({"final_fraction": 2.0}, "final_fraction"),
        ({"name": "noam"}, "d_model"),
    ],
)
def test_wrong_values_are_named(arguments: dict, word: str) -> None:
    values = {"name": "linear", "learning_rate": 1.0, "warmup_steps": 1, "total_steps": 2}
    with pytest.raises(ValueError, match=word):
        Schedule(**{**values, **arguments})


def test_step_counts_from_one() -> None:
    with pytest.raises(ValueError, match="step: got 0"):
        Schedule("constant", 1.0, 0, 1)(0)
