"""Statistics of the study against scipy, and against samples whose truth is known."""

import numpy as np
import pytest
from scipy import stats

from dynmoe_jax.study.rank_correlation import RankCorrelations, shuffled_within
from dynmoe_jax.study.statistics import (
    Estimate,
    estimate,
    for_few,
    resampled_lines,
    verdict,
)


@pytest.fixture(scope="module")
def tokens():
    """(x, y, group, document) of 3000 tokens: y goes with x, and both with the group."""
    draw = np.random.default_rng(0)
    group = draw.integers(0, 40, 3000)
    x = draw.normal(size=3000) + 0.1 * group
    y = np.round(0.5 * x + draw.normal(size=3000) + 0.2 * group).astype(int)
    return x, y, group, np.sort(draw.integers(0, 60, 3000))


def weights(documents, replicates=400):
    return np.random.default_rng(1).poisson(1.0, (documents, replicates)).astype(float)


def test_rank_correlation_is_that_of_scipy(tokens):
    x, y, _, document = tokens
    found = RankCorrelations(x, document, weights(60)).whole(y)
    np.testing.assert_allclose(found.value, stats.spearmanr(x, y).statistic, atol=1e-12)


def test_replicates_of_rank_correlation_are_those_of_repeated_documents(tokens):
    """Ranks of all tokens, documents as often as drawn, against numpy on the repeated tokens."""
    x, y, _, document = tokens
    times_DR = weights(60, 3)
    found = RankCorrelations(x, document, times_DR).whole(y)
    ranked, expected = (stats.rankdata(x), stats.rankdata(y)), np.zeros(3)
    for replicate, times in enumerate(times_DR.T):
        repeated = np.repeat(np.arange(len(x)), times[document].astype(int))
        expected[replicate] = np.corrcoef(ranked[0][repeated], ranked[1][repeated])[0, 1]
    expected = for_few(expected, np.bincount(document))
    np.testing.assert_allclose(found.replicate_R, expected, atol=1e-10)


@pytest.mark.parametrize("documents", [4, 50])
def test_interval_of_documents_covers_as_often_as_it_says(documents):
    """Of 200 samples about 95 % hold the truth, 0, although tokens of a document are alike."""
    covered = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        document = np.repeat(np.arange(documents), 10)
        x, y = (
            draw.normal(size=documents)[document] + draw.normal(size=len(document))
            for _ in range(2)
        )
        found = RankCorrelations(x, document, weights(documents, 200)).whole(y)
        covered += abs(found.value) <= estimate([found.value], [found.replicate_R]).within_half
    assert covered >= 0.90 * 200


def test_one_document_says_nothing_of_others():
    draw = np.random.default_rng(0)
    one = RankCorrelations(draw.normal(size=50), np.zeros(50, int), weights(1))
    found = one.whole(draw.normal(size=50))
    assert verdict(estimate([found.value], [found.replicate_R]), of_training=False) == "undecided"


def test_same_steps_are_resampled_alike_and_others_by_themselves():
    lines = resampled_lines(40, 0, 100)
    np.testing.assert_array_equal(lines, resampled_lines(40, 0, 100))
    assert (lines != resampled_lines(40, 0, 400)).any()
    assert (lines != resampled_lines(40, 1, 100)).any()
    np.testing.assert_array_equal(np.diff(lines[:, :6]), 1)  # blocks of neighbors


def test_within_groups_sees_nothing_where_groups_alone_matter(tokens):
    _, _, group, document = tokens
    draw = np.random.default_rng(2)
    x, y = draw.normal(size=3000) + group, draw.normal(size=3000) + group
    within = RankCorrelations(x, document, weights(60)).within(y, group)
    assert abs(within.value) < 0.05
    assert RankCorrelations(x, document, weights(60)).whole(y).value > 0.9
    assert RankCorrelations(x, document, weights(60)).across(y, group).value > 0.95


def test_within_one_group_is_the_whole_and_across_it_nothing(tokens):
    x, y, _, document = tokens
    one = np.zeros(len(x), int)
    whole = RankCorrelations(x, document, weights(60)).whole(y)
    within = RankCorrelations(x, document, weights(60)).within(y, one)
    np.testing.assert_allclose(within.value, whole.value, atol=1e-12)
    assert np.isnan(RankCorrelations(x, document, weights(60)).across(y, one).value)


def test_what_does_not_vary_has_no_correlation(tokens):
    x, _, _, document = tokens
    assert np.isnan(RankCorrelations(x, document, weights(60)).whole(np.full(len(x), 2)).value)


def test_shuffling_keeps_the_numbers_of_each_group(tokens):
    _, y, group, _ = tokens
    table = np.stack([y, 2 * y])
    found = shuffled_within(table, group)
    assert (found != table).any()
    np.testing.assert_array_equal(found[1], 2 * found[0])  # layers of a token stay together
    for number in np.unique(group):
        np.testing.assert_array_equal(np.sort(found[0][group == number]),
                                      np.sort(y[group == number]))  # fmt: skip


def test_interval_over_seeds_is_that_of_students_t():
    values = [1.0, 1.4, 1.3]
    found = estimate(values)
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    np.testing.assert_allclose(found.interval, expected)
    assert np.isnan(found.within_half)


def test_chance_of_documents_does_not_average_out_over_seeds():
    """The same documents for every seed: their half-width stays, and adds up with that of seeds."""
    shared_R = np.random.default_rng(0).normal(size=1000)
    value_S = np.array([1.0, 1.1, 1.2])
    found = estimate(value_S, value_S[:, None] + shared_R)
    np.testing.assert_allclose(found.within_half, 1.96 * np.std(shared_R, ddof=1), rtol=1e-3)
    half = np.hypot(found.seed_half, found.within_half)
    np.testing.assert_allclose(found.interval, [1.1 - half, 1.1 + half])


@pytest.mark.parametrize(
    ("low", "high", "least", "expected"),
    [
        (0.1, 0.3, 0.0, "yes"),
        (-0.1, 0.3, 0.0, "undecided"),
        (-0.3, -0.1, 0.0, "no"),
        (0.01, 0.03, 0.05, "no"),
        (-0.02, 0.03, 0.05, "no"),
        (0.01, 0.13, 0.05, "yes"),
        (0.01, 0.08, 0.05, "undecided"),
        (-0.01, 0.09, 0.05, "undecided"),
        (np.nan, np.nan, 0.0, "undecided"),
    ],
)
def test_verdict_follows_the_interval(low, high, least, expected):
    assert verdict(Estimate((low + high) / 2, low, high, seeds=3), least=least) == expected


def test_one_seed_decides_nothing_about_trainings():
    found = Estimate(1.0, 0.9, 1.1, seeds=1)
    assert verdict(found) == "undecided"
    assert verdict(found, of_training=False) == "yes"


def test_interval_of_a_correlation_is_cut_where_none_can_be():
    """Two seeds that differ have one that is wider than all correlations are."""
    cut = estimate([-0.9, 0.3]).cut(-1.0, 1.0)
    assert cut.interval == (-1.0, 1.0)
    assert estimate([0.2, 0.2]).cut(-1.0, 1.0).interval == pytest.approx((0.2, 0.2))
    assert not any(np.isfinite(estimate([0.2]).cut(-1.0, 1.0).interval))
