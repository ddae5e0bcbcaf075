"""GShard's two choices and Switch's one, against loops in plain Python."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.routing import RouterInput, TopK
from dynmoe_jax.routing.losses.balance import Balance
from dynmoe_jax.routing.transforms.capacity import Capacity

DRAWS, T, E = 200, 24, 6
FACTORS = (0.5, 1.0, 1.5, 2.0)
POLICIES = {
    "all": TopK(2, renormalize=True),
    "none": TopK(2, renormalize=True, second="none"),
    "threshold": TopK(2, renormalize=True, second="threshold"),
    "random": TopK(2, renormalize=True, second="random", second_threshold=0.5),
}
LOGITS_NTE = 1.5 * np.random.default_rng(0).normal(size=(DRAWS, T, E)).astype(np.float32)
COINS_NT = np.random.default_rng(1).uniform(size=(DRAWS, T)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class GivenCoins(RouterInput):
    """An input whose noise is written down."""

    coin_T: jax.Array | None = None

    def draws(self, draw, purpose=0):
        # A router that drew anything but two numbers for each token would not read these.
        wanted = jax.eval_shape(draw, jax.random.key(0)).shape
        assert wanted == (2,)
        return jnp.stack([jnp.ones_like(self.coin_T), self.coin_T], axis=-1)


def dispatched(routing):
    """The weight of every pair of a token and an expert, [T, E]."""
    hot_TKE = jax.nn.one_hot(routing.expert_TK, E)
    return jnp.einsum("tk,tke->te", routing.weight_TK, hot_TKE)


@pytest.fixture(scope="module")
def found():
    """Weights [200, T, E] by policy, a quarter of the draws at each capacity factor."""

    def route(router, factor, logits_TE, coin_T):
        keys_T2 = jnp.zeros((T, 2), jnp.uint32)
        seen = GivenCoins(None, logits_TE, jnp.ones(T, bool), key_T=keys_T2, coin_T=coin_T)
        routing = router({}, seen)
        return dispatched(Capacity(factor, 1, "choice")(routing, seen))

    @jax.jit
    def all_of_them(logits_NTE, coins_NT):
        part = DRAWS // len(FACTORS)
        return {
            name: jnp.concatenate(
                [
                    jax.vmap(lambda z, u, r=router, f=factor: route(r, f, z, u))(
                        logits_NTE[i * part : (i + 1) * part], coins_NT[i * part : (i + 1) * part]
                    )
                    for i, factor in enumerate(FACTORS)
                ]
            )
            for name, router in POLICIES.items()
        }

    return jax.tree.map(np.asarray, all_of_them(LOGITS_NTE, COINS_NT))


def by_loop(logits_TE, coin_T, policy, factor):
    """Weights by GShard's algorithm, one token after another; and pairs that found no place."""
    places = math.ceil(factor * T / E)
    first, second, weights = [], [], []
    for token in range(T):
        exp_E = np.exp(np.float64(logits_TE[token]))
        order = sorted(range(E), key=lambda e, p=exp_E: -p[e])
        a, b = order[:2]
        g1, g2 = exp_E[a] / (exp_E[a] + exp_E[b]), exp_E[b] / (exp_E[a] + exp_E[b])
        keep = {
            "all": True,
            "none": False,
            "threshold": g2 > 0.2,
            "random": coin_T[token] < min(1.0, g2 / 0.5),
        }[policy]
        first.append(a)
        second.append(b if keep else None)
        weights.append((g1, g2))
    taken, wanted_TE, dropped = [0] * E, np.zeros((T, E)), 0
    for choice, experts in enumerate((first, second)):
        for token, expert in enumerate(experts):
            if expert is None:
                continue
            if taken[expert] < places:
                taken[expert] += 1
                wanted_TE[token, expert] = weights[token][choice]
            else:
                dropped += 1
    return wanted_TE, dropped


@pytest.mark.parametrize("policy", POLICIES)
def test_gshard_is_that_of_a_loop(found, policy):
    pairs = dropped = 0
    for n in range(DRAWS):
        factor = FACTORS[n * len(FACTORS) // DRAWS]
        wanted_TE, lost = by_loop(LOGITS_NTE[n], COINS_NT[n], policy, factor)
        found_TE = found[policy][n]
        np.testing.assert_array_equal(found_TE > 0, wanted_TE > 0, err_msg=f"draw {n}")
        np.testing.assert_allclose(found_TE, wanted_TE, rtol=1e-5)
        pairs, dropped = pairs + np.sum(wanted_TE > 0), dropped + lost
    # Neither policies nor places are idle.
    assert dropped > DRAWS
    per_token = (pairs + dropped) / (DRAWS * T)
    fewest, most = {"all": (2, 2), "none": (1, 1)}.get(policy, (1.3, 1.9))
    assert fewest <= per_token <= most


def test_later_first_choices_displace_earlier_second_ones():
    # C tokens have expert 0 second, then C have it first, and it has C places.
    C = 3
    logits_TE = np.full((2 * C, E), -9.0, np.float32)
    for token in range(C):
        logits_TE[token, [token + 1, 0]] = 2.0, 1.0
        logits_TE[C + token, [0, token + 1]] = 2.0, 1.0
    routing = TopK(2, renormalize=True).on_logits(jnp.asarray(logits_TE), jnp.ones(2 * C, bool))
    capacity = Capacity(C * E / (2 * C), 1, "choice")
    assert capacity.places(2 * C, E) == C
    kept_TE = np.asarray(dispatched(capacity(routing, None)))
    np.testing.assert_array_equal(np.flatnonzero(kept_TE[:, 0]), [3, 4, 5])
    # What is left of a token keeps its own weight: nothing is renormalized.
    more, less = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))
    np.testing.assert_allclose(kept_TE[:C].sum(axis=1), more, rtol=1e-5)
    np.testing.assert_allclose(kept_TE[C:, 0], more, rtol=1e-5)
    np.testing.assert_allclose(kept_TE[C:, 1:].sum(axis=1), less, rtol=1e-5)


def test_switch_drops_by_position_what_a_count_says():
    logits_NTE = LOGITS_NTE[:40] + np.linspace(0, 2, E, dtype=np.float32)
    for factor in (0.5, 1.0, 1.25):
        capacity = Capacity(factor, 1, "token")
        route = jax.jit(
            jax.vmap(
                lambda z, c=capacity: dispatched(c(TopK(1).on_logits(z, jnp.ones(T, bool)), None))
            )
        )
        places, kept_NTE = math.ceil(factor * T / E), np.asarray(route(logits_NTE))
        for logits_TE, kept_TE in zip(logits_NTE, kept_NTE, strict=True):
            expert_T = np.argmax(logits_TE, axis=-1)
            count_E = np.bincount(expert_T, minlength=E)
            kept_E = np.sum(kept_TE > 0, axis=0)
            np.testing.assert_array_equal(count_E - kept_E, np.maximum(0, count_E - places))
            for expert in range(E):
                mine = np.flatnonzero(expert_T == expert)
                np.testing.assert_array_equal(np.flatnonzero(kept_TE[:, expert]), mine[:places])
            # The weight is the raw probability.
            probs_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(axis=-1, keepdims=True)
            np.testing.assert_allclose(kept_TE, np.where(kept_TE > 0, probs_TE, 0), rtol=1e-5)


@pytest.mark.parametrize(("k", "counts"), [(1, "sum"), (2, "first_choice_only")])
def test_auxiliary_losses_are_1_at_even_load_and_e_at_collapse(k, counts):
    """Switch's and GShard's, of routed logits."""
    loss, router = Balance(counts=counts), TopK(k, renormalize=k == 2)

    def value(logits_TE):
        valid_T = jnp.ones(len(logits_TE), bool)
        sums = loss.sums(
            router.on_logits(logits_TE, valid_T), RouterInput(None, logits_TE, valid_T), {}
        )
        return loss.value(sums, len(logits_TE))

    # Each token leans to another expert, so first choices and mean probabilities are even.
    even_TE = jnp.asarray(np.tile(np.eye(E, dtype=np.float32), (T // E, 1)))
    np.testing.assert_allclose(value(even_TE), 1.0, rtol=1e-5)
    np.testing.assert_allclose(value(jnp.zeros((T, E)).at[:, 2].set(60.0)), E, rtol=1e-5)


def test_both_orders_of_softmax_are_mixtrals():
    logits_TE, valid_T = jnp.asarray(LOGITS_NTE[0]), jnp.ones(T, bool)
    before = TopK(2, renormalize=True).on_logits(logits_TE, valid_T)
    after = TopK(2, softmax="after").on_logits(logits_TE, valid_T)
    np.testing.assert_array_equal(after.expert_TK, before.expert_TK)
    np.testing.assert_allclose(after.weight_TK, before.weight_TK, rtol=0, atol=1e-6)
    np.testing.assert_allclose(after.weight_TK.sum(axis=-1), 1.0, atol=1e-6)
