"""Routers that are fitted to a split model choose better than chance, and no better than an oracle.

Axis legend: S sampled tokens, E experts, F hidden units, D model width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dynmoe_jax.edits.places import Place, stored_in
from dynmoe_jax.experts.kinds.relu import ReLU
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.model import Decoder
from dynmoe_jax.model.stacks import stacks_of
from dynmoe_jax.surgery.experts.router_fit import pairs_of
from dynmoe_jax.surgery.operations.fit_router import FitRouter
from dynmoe_jax.surgery.operations.split import Split
from tests.close import assert_close
from tests.in_memory_surgery import drawn, logits, result_of, settings

E, D, F = 5, 16, 40
UP, DOWN = (Place(0, f"feed_forward.{name}") for name in ("up_DF", "down_FD"))


def new_weights(cfg):
    """Arrays of a new model by place: it learns better than one whose weights are all alike."""
    leaves = dict(nnx.state(Decoder(cfg.model, rngs=nnx.Rngs(0))).flat_state())
    return {
        place: np.asarray(leaves[stored.path].get_value())[stored.index(place)]
        for stored, _ in stored_in(cfg.model)
        for place in stored.places()
    }


@pytest.fixture(scope="module")
def trained():
    """(model, samples): one ReLU layer, trained to tell eight kinds of tokens apart."""
    cfg = settings(activation="relu", num_layers=1, hidden_width=F)
    random = np.random.default_rng(0)
    kinds, maps = random.standard_normal((8, D)), random.standard_normal((8, D, D))
    of_S = random.integers(0, 8, 2048)
    x_SD = (kinds[of_S] + 0.3 * random.standard_normal((2048, D))).astype(np.float32)
    y_SD = np.einsum("sd,sde->se", x_SD, maps[of_S]).astype(np.float32)
    new = new_weights(cfg)

    @jax.jit
    def train(up_DF, down_FD):
        def loss(params):
            return jnp.mean((jax.nn.relu(x_SD @ params[0]) @ params[1] - y_SD) ** 2)

        def step(carry, _):
            updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        optimizer, params = optax.adam(1e-2), (up_DF, down_FD)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=300)
        return params

    up_DF, down_FD = map(np.asarray, train(new[UP], new[DOWN]))
    return (cfg, {**drawn(cfg), UP: up_DF, DOWN: down_FD}), x_SD


@pytest.fixture(scope="module")
def split(trained):
    return result_of(Split(num_experts=E, by="clusters"), trained[0])


@pytest.mark.parametrize("choice", [{"by": "scores"}, {"by": "labels"}], ids=str)
def test_errors_rise_from_the_oracle_to_the_fitted_router_to_chance(trained, split, choice):
    found = {}
    operation = FitRouter(top_k=1, **choice)
    cfg, arrays = result_of(
        operation, split, statistic=lambda name, layer: trained[1], findings=found
    )
    error = found[0]
    assert error["oracle"] < error["fitted"] < error["chance"]
    route = cfg.model.moe.route
    assert (route.k, route.net) == (1, "tanh" if choice["by"] == "scores" else "linear")
    assert arrays[Place(0, "feed_forward.router_DE")].shape == (D, E)
    # Nothing else has changed.
    for place, array in split[1].items():
        if "router" not in place.name:
            np.testing.assert_array_equal(arrays[place], array)


def test_with_all_experts_on_a_fitted_router_changes_nothing(trained, split):
    operation = FitRouter(epochs=1)
    assert operation.promise([split[0]]) == 1e-5
    assert FitRouter(top_k=2).promise([split[0]]) is None
    result = result_of(operation, split, statistic=lambda name, layer: trained[1][:64])
    assert np.abs(logits(*result) - logits(*split)).max() < 1e-5


def test_inputs_are_gathered_with_all_experts_on(split):
    fewer = FitRouter(top_k=2).result([split[0]])
    wanted = FitRouter().wanted([fewer])
    assert wanted.model.by_layer[0].model.moe.route.k == E
    # It is read from where the parent's arrays lie.
    names = [[stack.name for stack in stacks_of(m)] for m in (wanted.model, fewer.model)]
    assert names[0] == names[1]
    assert FitRouter(by="labels", top_k=2).result([split[0]]).model.moe.routed_scale == E / 2


def test_labels_are_the_nearest_of_all_experts_and_never_one_that_is_always_zero():
    random, k = np.random.default_rng(1), 2
    weights = {
        "up_EDF": random.standard_normal((E, D, 3)).astype(np.float32),
        "down_EFD": random.standard_normal((E, 3, D)).astype(np.float32),
    }
    x_SD = random.standard_normal((300, D)).astype(np.float32)
    outputs = np.maximum(np.einsum("sd,edf->esf", x_SD, weights["up_EDF"]), 0)
    score_ES = outputs.sum(axis=2)
    outputs = outputs @ weights["down_EFD"]
    pairs = pairs_of(ReLU(), weights, x_SD)
    assert_close(pairs.score_SE, score_ES.T, 1e-5)
    share_SD = outputs.sum(axis=0) / (E / k)
    distance_SE = np.square(outputs - share_SD).sum(axis=2).T
    assert_close(pairs.distance_SE(k), distance_SE, 1e-4)
    chosen_SE = pairs.best("labels", k)
    assert (chosen_SE.sum(axis=1) == k).all()
    apart = (
        np.where(chosen_SE, distance_SE, -np.inf).max(1),
        np.where(chosen_SE, np.inf, distance_SE).min(1),
    )
    assert (apart[0] <= apart[1] * (1 + 1e-4)).all()
    # The error of a choice is that of the output itself.
    kept = np.einsum("se,esd->sd", 1.5 * chosen_SE, outputs) - outputs.sum(axis=0)
    expected = np.square(kept).sum() / np.square(outputs.sum(axis=0)).sum()
    assert pairs.error(chosen_SE, 1.5) == pytest.approx(expected, rel=1e-4)
    # Experts that share one direction, and one that gives nothing.
    weights = {name: np.abs(array) for name, array in weights.items()}
    weights["down_EFD"][3] = 0.0
    zero = pairs_of(ReLU(), weights, np.abs(x_SD))
    assert not zero.best("labels", k)[:, 3].any()


def test_models_that_were_not_split_are_refused(trained):
    with pytest.raises(ConfigError, match="Layer 0 of --from has no experts that top-k weighs by"):
        FitRouter().result([trained[0][0]])
    soft = Split(num_experts=E, gates="softmax", top_k=2).result([trained[0][0]])
    with pytest.raises(ConfigError, match="--gates=ones"):
        FitRouter().result([soft])
