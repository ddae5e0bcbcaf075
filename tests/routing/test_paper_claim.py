"""The headline of the paper, asked of small models on a made corpus (docs/measurements.md:
paper-claim-made): what holds there, and what does not."""

import numpy as np
import pytest

from benchmarks.paper_claim import STATES, Chain, Mixture, correlation, last_mean, on_made

ARMS = ("beta 0", "beta 1e-2", "p 0.3", "p 0.7")


@pytest.fixture(scope="module")
def trained():
    # The program runs for seconds: optimizing it takes longer.
    fast = {"xla_backend_optimization_level": 0}
    return on_made(Chain, 100, batch=4, arms=ARMS, compiler_options=fast)


def test_the_entropy_loss_lowers_the_number_of_experts(trained):
    """With a hundred times the paper's weight: at 1e-4 its effect is within that of the seed."""
    models, _ = trained
    free, pressed = (last_mean(models.of(arm)) for arm in ("beta 0", "beta 1e-2"))
    assert np.mean(pressed) < np.mean(free) - 0.05


def test_a_larger_threshold_uses_more_experts(trained):
    models, _ = trained
    low, high = (last_mean(models.of(arm)) for arm in ("p 0.3", "p 0.7"))
    assert np.all(high > low + 1)


def test_experts_and_surprise_have_a_correlation_with_an_interval(trained):
    models, uncertain_ABL = trained
    arm = models.of("beta 0")
    # The models have learned which positions are certain.
    for surprise_BL, uncertain_BL in zip(arm.surprise_ABL, uncertain_ABL, strict=False):
        assert surprise_BL[uncertain_BL].mean() > surprise_BL[~uncertain_BL].mean() + 0.5
    for experts_BL, surprise_BL in zip(arm.experts_ABL, arm.surprise_ABL, strict=True):
        r, low, high = correlation(experts_BL, surprise_BL)
        assert -1 <= low <= r <= high <= 1


def test_the_interval_of_a_correlation_holds_it():
    draw = np.random.default_rng(1)
    x_BL = draw.normal(size=(64, 32))
    y_BL = 0.6 * x_BL + 0.8 * draw.normal(size=(64, 32))
    r, low, high = correlation(x_BL, y_BL)
    assert low < 0.6 < high
    assert 0 < high - low < 0.15
    assert r == pytest.approx(0.6, abs=0.05)


def test_a_mixture_is_certain_but_where_a_passage_begins():
    """Certain successors are those of one source, and follow from the two tokens before."""
    source = Mixture.drawn(0)
    assert len(np.unique(source.next_SV, axis=1)[0]) == STATES
    assert all(len(set(column)) == len(column) for column in source.next_SV.T)
    tokens = source.sequences(1, 64, 40)
    uncertain = source.uncertain(tokens)
    assert 0.15 < uncertain.mean() < 0.5
    for row, marks in zip(tokens, uncertain, strict=True):
        for i in range(1, len(row) - 1):
            if not marks[i] and row[i + 1] != STATES:
                (which,) = np.flatnonzero(source.next_SV[:, row[i - 1]] == row[i])
                assert row[i + 1] == source.next_SV[which, row[i]]
