"""Interleaving and ratios."""

import numpy as np
import pytest

from benchmarks import timing


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE_S", 0.0)


def test_every_round_runs_each_case_once_in_turn():
    order = []

    def case(name, seconds):
        def run():
            order.append(name)
            return seconds

        return run

    seconds = timing.interleave({"a": case("a", 1.0), "b": case("b", 2.0)}, rounds=2)
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert seconds["b"].tolist() == [2.0, 2.0]


def test_of_runs_in_a_row_the_last_counts():
    taken = iter([9.0, 5.0, 1.0, 6.0, 2.0])  # the first warms up
    seconds = timing.interleave({"a": lambda: next(taken)}, rounds=2, in_a_row=2)
    assert seconds["a"].tolist() == [1.0, 2.0]


def test_a_slow_case_runs_in_the_first_rounds_alone():
    cases = {"fast/top_1": lambda: 1.0, "slow/top_1": lambda: 9.0}
    seconds = timing.interleave(cases, rounds=4)
    assert np.isfinite(seconds["slow/top_1"]).tolist() == [True, True, False, False]
    assert timing.ratio(seconds["slow/top_1"], seconds["fast/top_1"]).median == 9.0


def test_a_case_is_slow_beside_those_that_do_the_same_work_alone():
    # A copy of some bytes is no measure of a layer, nor is one expert of seven.
    cases = {"copy": lambda: 0.01, "ours/top_1": lambda: 1.0, "ours/top_7": lambda: 9.0}
    seconds = timing.interleave(cases, rounds=4)
    assert all(np.all(np.isfinite(found)) for found in seconds.values())


def test_ratio_compares_medians_and_spreads_over_rounds():
    over, under = np.array([2.0, 4.0, 9.0]), np.array([1.0, 4.0, 3.0])
    found = timing.ratio(over, under)
    assert found.median == pytest.approx(4 / 3)
    # The ratios within rounds are 2, 1 and 3.
    assert (found.low, found.high) == (1.5, 2.5)
    assert str(found) == "1.33 [1.50, 2.50]"
