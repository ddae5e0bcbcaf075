"""The domain posterior, beside sums that are written out."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.inference.ensemble.posterior import (
    before_each_token,
    log_posterior,
    loss_bound,
    mixture,
    moving_average,
    uniform,
)

J, B, L = 3, 2, 9
POSITION_BL = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 0, 1]])
PRIOR_J = np.array([0.5, 0.2, 0.3])


@pytest.fixture
def loglik_JBL():
    return -np.random.default_rng(0).gamma(2.0, 1.0, (J, B, L))


def written_out(loglik_JBL, top_k=0):
    """(posterior of each member, likelihood of the ensemble), by Bayes' rule token by token."""
    posterior, likelihood = np.zeros((J, B, L)), np.zeros((B, L))
    for b in range(B):
        for i in range(L):
            start = i - POSITION_BL[b, i]
            joint = [PRIOR_J[j] * math.exp(sum(loglik_JBL[j, b, start:i])) for j in range(J)]
            if top_k:
                kept = sorted(range(J), key=lambda j: -joint[j])[:top_k]
                joint = [p * (j in kept) for j, p in enumerate(joint)]
            posterior[:, b, i] = [p / sum(joint) for p in joint]
            parts = [posterior[j, b, i] * math.exp(loglik_JBL[j, b, i]) for j in range(J)]
            likelihood[b, i] = sum(parts)
    return posterior, likelihood


@pytest.mark.parametrize("top_k", [0, 1, 2, 3])
def test_it_is_bayes_rule_within_each_document(loglik_JBL, top_k):
    posterior, likelihood = written_out(loglik_JBL, top_k)
    before_JBL = before_each_token(loglik_JBL, POSITION_BL)
    found_JBL = log_posterior(before_JBL, np.log(PRIOR_J), top_k)
    np.testing.assert_allclose(np.exp(found_JBL), posterior, rtol=1e-12)
    np.testing.assert_allclose(np.exp(found_JBL).sum(0), 1, rtol=1e-14)
    np.testing.assert_allclose(np.exp(mixture(found_JBL, loglik_JBL)), likelihood, rtol=1e-12)


def test_a_document_as_a_whole_is_as_likely_as_its_mixture(loglik_JBL):
    """The chain rule: products of the ensemble's tokens are the mixture of whole texts."""
    ll_JBL = log_posterior(before_each_token(loglik_JBL, POSITION_BL), np.log(PRIOR_J))
    whole = mixture(ll_JBL, loglik_JBL)[0, :4].sum()
    assert math.exp(whole) == pytest.approx(PRIOR_J @ np.exp(loglik_JBL[:, 0, :4].sum(-1)))


def test_jax_computes_the_same_in_float32(loglik_JBL):
    arrays = jnp.asarray(loglik_JBL, jnp.float32), jnp.asarray(POSITION_BL)
    found = log_posterior(before_each_token(*arrays), jnp.log(jnp.asarray(PRIOR_J)), 2)
    before_JBL = before_each_token(loglik_JBL, POSITION_BL)
    assert found.dtype == jnp.float32
    expected = np.exp(log_posterior(before_JBL, np.log(PRIOR_J), 2))
    np.testing.assert_allclose(np.exp(found), expected, atol=1e-5)


def test_likelihoods_that_no_number_holds_do_no_harm():
    loglik_JX = np.array([[-2e4, -1e4], [-2e4 - 1, -3e4]])
    found = np.exp(log_posterior(loglik_JX, uniform(2)))
    np.testing.assert_allclose(found[0], [1 / (1 + math.exp(-1)), 1.0], rtol=1e-12)


def test_members_without_a_prior_are_left_out():
    found = np.exp(log_posterior(np.array([[-5.0], [-1.0]]), np.array([0.0, -np.inf])))
    np.testing.assert_array_equal(found, [[1.0], [0.0]])


def test_the_prior_is_the_moving_average_of_pandas():
    """``ewm(alpha=0.3, adjust=False).mean()`` of 1, 0, 1: 1, 0.7, 0.79."""
    found = moving_average(np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
    np.testing.assert_allclose(found, [0.79, 0.21])


def test_no_ensemble_exceeds_the_bound():
    random = np.random.default_rng(1)
    for _ in range(50):
        loglik_JBL = -random.gamma(0.5, 2.0, (J, B, L))
        log_JBL = log_posterior(before_each_token(loglik_JBL, POSITION_BL), uniform(J))
        loss = -mixture(log_JBL, loglik_JBL).mean()
        documents = (POSITION_BL == 0).sum()
        loss_J = -loglik_JBL.mean((1, 2))
        bound = loss_bound(loss_J, uniform(J), B * L / documents)
        assert bound == pytest.approx(loss_J.min() + math.log(J) * documents / (B * L))
        assert loss <= bound
