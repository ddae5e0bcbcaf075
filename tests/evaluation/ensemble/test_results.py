"""Results of an ensemble on scores that are given."""

import math

import numpy as np
import pytest

from dynmoe_jax.evaluation.ensemble.results import estimated_prior, results_of
from dynmoe_jax.evaluation.ensemble.scores import Scores
from dynmoe_jax.inference.ensemble.posterior import uniform

DOCUMENTS, LENGTH = 12, 8


def scores(better, gap=0.5, seed=0):
    """Twelve documents of eight tokens, one behind another in rows of sixteen, whose every token
    the ``better`` of three members finds more likely by ``gap`` nats; the last four are padding."""
    random = np.random.default_rng(seed)
    loglik_JRL = np.broadcast_to(-random.gamma(4.0, 1.0, (6, 16)), (3, 6, 16)).copy()
    loglik_JRL[better] += gap
    valid_RL = np.ones((6, 16), bool)
    valid_RL[-1, -4:] = False
    position_RL = np.where(valid_RL, np.arange(16) % LENGTH, 0)
    loglik_JRL = np.where(valid_RL, loglik_JRL, 0.0)
    return Scores(loglik_JRL, position_RL, valid_RL, np.where(valid_RL, 2, 0))


def test_losses_and_posteriors_by_domain_and_of_all():
    record = results_of({"code": scores(0), "prose": scores(2, gap=0.1)}, uniform(3))
    code, prose = record["domains"]["code"], record["domains"]["prose"]
    assert (code["documents"], code["tokens"], code["bytes"]) == (12, 92, 184)
    # By hand: behind n tokens the better one has e^(n/2) of e^(n/2) + 2.
    shares = [math.exp(n / 2) / (math.exp(n / 2) + 2) for n in range(8)]
    by_position = {x["position"]: x["posterior"] for x in code["posterior_by_position"]}
    for position in (0, 1, 2, 5):
        assert by_position[position] == pytest.approx(
            [shares[position], *[(1 - shares[position]) / 2] * 2]
        )
    # The last document has its first four tokens alone.
    mean = (sum(shares) * 11 + sum(shares[:4])) / 92
    assert code["posterior"][0] == pytest.approx(mean)
    assert code["tokens_until_sure"] == next(n for n, share in enumerate(shares) if share > 0.9)
    assert math.isnan(prose["tokens_until_sure"])  # never so much in eight tokens
    assert np.argmin(code["loss_by_member"]) == 0
    assert code["loss_by_member"][0] == pytest.approx(code["loss_by_member"][1] - 0.5)
    for domain in (code, prose):
        least = min(domain["loss_by_member"])
        assert domain["loss_bound"] == pytest.approx(least + math.log(3) * 12 / 92)
        assert least < domain["loss"] < domain["loss_bound"]
    assert record["all"]["nll"] == pytest.approx(code["nll"] + prose["nll"])
    bits = record["all"]["nll"] / math.log(2) / (184 + 184)
    assert record["all"]["bits_per_byte"] == pytest.approx(bits)


def test_the_best_member_alone_is_the_ensemble_with_all_of_the_prior():
    with np.errstate(divide="ignore"):
        record = results_of({"code": scores(0)}, np.log(np.array([1.0, 0.0, 0.0])))
    code = record["domains"]["code"]
    assert code["loss"] == pytest.approx(code["loss_by_member"][0], rel=1e-12)
    assert code["loss_bound"] == pytest.approx(code["loss"])


def test_one_member_at_a_time_is_the_one_that_was_best_so_far():
    found = scores(1)
    code = results_of({"code": found}, uniform(3), top_k=1)["domains"]["code"]
    # Of equal ones the first, so that each document's first token is the first member's.
    first = (found.valid_RL & (found.position_RL == 0)).sum()
    assert code["nll"] == pytest.approx(code["nll_by_member"][1] + 0.5 * first)
    assert code["posterior"] == pytest.approx([first / 92, 1 - first / 92, 0])


def test_an_estimated_prior_is_of_text_that_is_not_evaluated():
    found = scores(2)
    prior_J, taken = estimated_prior(found)
    assert taken == 6
    share = math.exp(4.0) / (math.exp(4.0) + 2)  # behind eight tokens, of every document
    assert prior_J == pytest.approx([(1 - share) / 2, (1 - share) / 2, share])
    code = results_of({"code": found}, None)["domains"]["code"]
    assert (code["documents"], code["documents_of_prior"], code["tokens"]) == (6, 6, 44)
    later_RL = np.arange(6)[:, None] >= 3
    expected = -found.loglik_JRL[:, np.broadcast_to(later_RL, (6, 16))].sum(1)
    np.testing.assert_allclose(code["nll_by_member"], expected)
    np.testing.assert_allclose(code["prior"], prior_J)


def test_a_prior_of_one_document_is_uniform():
    one = scores(0)
    position_RL = np.arange(96).reshape(6, 16)
    alone = Scores(one.loglik_JRL, position_RL, one.valid_RL, one.bytes_RL)
    prior_J, taken = estimated_prior(alone)
    assert taken == 0
    assert prior_J == pytest.approx([1 / 3] * 3)
