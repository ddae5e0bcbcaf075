"""XMoE: top-p 0.9 whose choices are served by rank."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from configs.routers.xmoe import get_config
from dynmoe_jax import config
from dynmoe_jax.routing import TopP
from dynmoe_jax.routing.losses.balance import Balance
from dynmoe_jax.routing.transforms.capacity import Capacity
from tests.routing.given import E, T, given

CFG = config.from_config_dict(get_config())
ROUTER = CFG.model.moe.route
(SERVED,) = (CFG.model.moe.capacity,)
LOGITS_TE = np.asarray(2 * jax.random.normal(jax.random.key(0), (T, E)))


@jax.jit
def route(logits_TE):
    return ROUTER.on_logits(logits_TE, jnp.ones(len(logits_TE), bool))


def sets_of(routing):
    return [set(experts[experts < E].tolist()) for experts in np.asarray(routing.expert_TK)]


def released_sets(logits_TE, threshold, strict):
    """Sorted expert m is kept while the mass before it is below (or at) t; the first always."""
    sets = []
    for logits_E in np.asarray(logits_TE, np.float32):
        p_E = np.exp(logits_E - logits_E.max())
        p_E = p_E / p_E.sum()
        order_E = np.argsort(-p_E, kind="stable")
        before_E = np.concatenate([[0], np.cumsum(p_E[order_E], dtype=np.float32)[:-1]])
        keep_E = before_E < threshold if strict else before_E <= threshold
        keep_E[0] = True
        sets.append(set(order_E[keep_E].tolist()))
    return sets


def test_sets_are_those_of_the_strict_inequality_away_from_ties():
    found = sets_of(route(LOGITS_TE))
    assert found == released_sets(LOGITS_TE, 0.9, strict=True)
    assert len({len(experts) for experts in found}) > 2
    np.testing.assert_array_equal(route(LOGITS_TE).expert_TK, TopP(0.9).on_logits(
        LOGITS_TE, jnp.ones(T, bool)
    ).expert_TK)  # fmt: skip


def test_twins_differ_where_the_mass_before_is_the_threshold_alone():
    # Four even experts of probability 1/4: the mass before the third is exactly 1/2.
    logits_TE = jnp.where(jnp.arange(E) < 4, 0.0, -jnp.inf)[None]
    found = sets_of(TopP(0.5).on_logits(jnp.maximum(logits_TE, -200.0), jnp.ones(1, bool)))
    assert found == released_sets(np.maximum(logits_TE, -200), 0.5, strict=False) == [{0, 1, 2}]
    assert released_sets(np.maximum(logits_TE, -200), 0.5, strict=True) == [{0, 1}]


def test_weights_are_raw_probabilities():
    routing = route(LOGITS_TE)
    probs_TE = np.append(jax.nn.softmax(LOGITS_TE), np.zeros((T, 1)), axis=1)
    wanted_TK = np.take_along_axis(probs_TE, np.asarray(routing.expert_TK), axis=1)
    np.testing.assert_allclose(routing.weight_TK, wanted_TK, rtol=1e-5, atol=1e-7)


def by_rank(expert_TK, places):
    """(token, expert) pairs kept where all first choices are served before any second one."""
    kept, taken = set(), np.zeros(E, int)
    for slot in range(expert_TK.shape[1]):
        for token, experts in enumerate(expert_TK):
            expert = experts[slot]
            if expert < E and taken[expert] < places:
                taken[expert] += 1
                kept.add((token, int(expert)))
    return kept


def test_over_capacity_choices_are_served_by_rank():
    assert (SERVED.priority, SERVED.factor) == ("choice", 8.0)
    routing = route(LOGITS_TE)
    tight = dataclasses.replace(SERVED, factor=0.5, minimum=1)
    places = tight.places(T, E)
    kept = tight(routing, given(ROUTER, LOGITS_TE))
    found = {(t, e) for t, experts in enumerate(sets_of(kept)) for e in experts}
    assert found == by_rank(np.asarray(routing.expert_TK), places)
    assert len(found) < int(routing.used_TK.sum())


def test_the_one_place_of_an_expert_goes_to_a_first_choice_where_there_is_one():
    routing = route(LOGITS_TE)
    one = Capacity(factor=1e-6, minimum=1, priority="choice")
    kept = one(routing, given(ROUTER, LOGITS_TE))
    first_T = np.asarray(routing.expert_TK)[:, 0]
    owners = {e: t for t, experts in enumerate(sets_of(kept)) for e in experts}
    assert len(owners) == sum(map(len, sets_of(kept))) == E
    for expert in set(first_T.tolist()):
        assert first_T[owners[expert]] == expert
    later = one.__class__(factor=1e-6, minimum=1, priority="token")(
        routing, given(ROUTER, LOGITS_TE)
    )
    assert sets_of(later) != sets_of(kept)


def test_balance_counts_first_choices_alone():
    loss: Balance = CFG.loss.balance
    seen = given(ROUTER, LOGITS_TE)
    routing = route(LOGITS_TE)
    found = loss.value(loss.sums(routing, seen, {}), jnp.float32(T))
    probs_TE = np.asarray(jax.nn.softmax(LOGITS_TE))
    first_E = np.bincount(probs_TE.argmax(axis=1), minlength=E) / T
    np.testing.assert_allclose(found, E * np.sum(first_E * probs_TE.mean(axis=0)), rtol=1e-5)
