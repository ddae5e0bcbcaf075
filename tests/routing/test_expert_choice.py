"""Expert choice: what experts take, against plain Python; and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.routing import RouterInput
from dynmoe_jax.routing.routers import ExpertChoice

S, L, E = 3, 8, 4
T = S * L


def decide(logits_TE, valid_T=None, **settings):
    valid_T = jnp.ones(len(logits_TE), bool) if valid_T is None else valid_T
    seen = RouterInput(None, jnp.asarray(logits_TE), valid_T, length=L)
    return ExpertChoice(**settings)({}, seen)


def draw(seed=0):
    return np.random.default_rng(seed).normal(size=(T, E)).astype(np.float32)


def softmax(z_TE):
    e_TE = np.exp(z_TE - z_TE.max(axis=-1, keepdims=True))
    return e_TE / e_TE.sum(axis=-1, keepdims=True)


def wanted(logits_TE, valid_T, mean, group):
    """{(token, expert): weight}, expert by expert."""
    probs_TE, pairs = softmax(logits_TE.astype(np.float64)), {}
    tokens, length = len(probs_TE), L if group == "sequence" else len(probs_TE)
    for first in range(0, tokens, length):
        there = [t for t in range(first, first + length) if valid_T[t]]
        for e in range(E):
            capacity = max(1, int(len(there) * mean / E)) if there else 0
            best = sorted(there, key=lambda t: -probs_TE[t, e])[:capacity]
            pairs |= {(t, e): probs_TE[t, e] for t in best}
    return pairs


def pairs_of(slots):
    token_EC, weight_EC = np.asarray(slots.token_EC), np.asarray(slots.weight_EC)
    return {
        (int(token_EC[e, c]), e): weight_EC[e, c]
        for e, c in zip(*np.nonzero(token_EC < T), strict=True)
    }


@pytest.mark.parametrize("group", ["sequence", "batch"])
@pytest.mark.parametrize("mean", [0.5, 1.0, 1.9, 4.0])
def test_pairs_are_those_of_plain_python(group, mean):
    valid_T = np.ones(T, bool)
    valid_T[[3, 10, 11, 12, 13, 14]] = False
    valid_T[2 * L :] = False
    found = pairs_of(decide(draw(), valid_T, experts_per_token=mean, group=group))
    by_hand = wanted(draw(), valid_T, mean, group)
    assert found.keys() == by_hand.keys()
    for pair, weight in by_hand.items():
        assert found[pair] == pytest.approx(weight, rel=1e-5)


@pytest.mark.parametrize("group", ["sequence", "batch"])
@pytest.mark.parametrize("case", ["drawn", "constant", "one expert dominates", "one token"])
def test_every_expert_takes_exactly_its_capacity(case, group):
    logits_TE = draw() if case == "drawn" else np.zeros((T, E), np.float32)
    if case == "one expert dominates":
        logits_TE[:, 1] = 80.0
    if case == "one token":
        logits_TE[5] = 40.0
    slots = decide(logits_TE, experts_per_token=1.5, group=group)
    capacity = {"sequence": S * (3 * L // 2 // E), "batch": 3 * T // 2 // E}[group]
    routing = slots.by_token()
    np.testing.assert_array_equal(routing.load_E, [capacity] * E)
    assert len(pairs_of(slots)) == routing.most_rows == E * capacity
    assert int(jnp.sum(routing.experts_per_token_T)) == E * capacity


def test_tokens_have_unlike_numbers_of_experts():
    counts_T = decide(draw()).by_token().experts_per_token_T
    assert len(set(np.asarray(counts_T).tolist())) > 2
    assert float(jnp.mean(counts_T)) == 2.0


def test_gradients_are_slopes_of_the_chosen_probabilities():
    logits_TE, valid_T = draw(), np.arange(T) % 5 != 2
    along_TE = draw(1).astype(np.float64)
    weights = np.random.default_rng(2).normal(size=(T, E))

    def loss(logits_TE):
        slots = decide(logits_TE, valid_T)
        token_EC, expert_E1 = slots.token_EC, jnp.arange(E)[:, None]
        each_EC = (
            jnp.asarray(weights, jnp.float32)
            .at[token_EC, expert_E1]
            .get(mode="fill", fill_value=0.0)
        )
        return jnp.sum(each_EC * slots.weight_EC)

    chosen = wanted(logits_TE, valid_T, 2.0, "sequence")

    def by_hand(logits_TE):
        probs_TE = softmax(logits_TE)
        return sum(weights[pair] * probs_TE[pair] for pair in chosen)

    slope = np.sum(np.asarray(jax.grad(loss)(jnp.asarray(logits_TE)), np.float64) * along_TE)
    step = 1e-6
    ends = [by_hand(logits_TE.astype(np.float64) + s * step * along_TE) for s in (1, -1)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-5)


def test_a_mean_that_is_more_than_all_experts_is_refused():
    assert ExpertChoice(experts_per_token=5.0).obstacle(4).startswith("experts_per_token=5 must")
    assert ExpertChoice(experts_per_token=4.0).obstacle(4) is None
