"""Dense feed-forwards of every kind of expert, registered or a toy: as one expert on all tokens, on
one device and on eight."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.interop.architectures.registry import architecture_for
from dynmoe_jax.mesh.make_mesh import batch_sharding, check_divides, make_mesh, state_shardings
from dynmoe_jax.model.dense_feed_forward import DenseFeedForward
from dynmoe_jax.model.feed_forward import MoEFeedForward
from dynmoe_jax.model.inputs import TokenPositions
from dynmoe_jax.registry import EXPERTS, chosen
from dynmoe_jax.runs.errors import CheckpointError
from tests.experts.kinds.toy_kinds import TOYS

T, D, F = 16, 8, 12
KINDS = [*EXPERTS, "biased", "scaled"]


@pytest.fixture(scope="module", autouse=True)
def toys():
    with contextlib.ExitStack() as stack:
        for name, kind in TOYS.items():
            stack.enter_context(EXPERTS.temporarily(name, kind))
        yield


def model_of(activation, **changes):
    settings = {"num_layers": 2, "width": D, "hidden_width": F, "dtype": "float32"} | changes
    moe = config.MoE(every_n_layers=0)
    return config.Model(activation=activation, moe=moe, **settings)


def drawn(model):
    """(structure, parameters, none of which is zero)."""
    structure, shapes = nnx.split(nnx.eval_shape(lambda: DenseFeedForward(model, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(random.normal(size=leaf.shape) / 2, jnp.float32)  # noqa: E731
    return structure, jax.tree.map(draw, shapes)


def x_TD():
    return np.random.default_rng(1).normal(size=(T, D)).astype(np.float32)


def computed(structure, params, x_TD):
    """(y_TD, gradients of parameters and tokens) of a loss of the outputs."""

    def loss(params, x_TD):
        y_TD = nnx.merge(structure, params)(x_TD)
        return jnp.sum(jnp.sin(y_TD)), y_TD

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, y_TD), (of_params, of_x_TD) = grad(params, x_TD)
    return {path[-1]: leaf[...] for path, leaf in of_params.flat_state()} | {
        "x": of_x_TD,
        "y": y_TD,
    }


def as_one_expert(kind, params, x_TD):
    """The same by the kind itself, whose parameters have an axis E more."""
    named = {path[-1]: leaf[...] for path, leaf in params.flat_state()}
    declared = kind.parameters(D, 1, F)
    assert len(named) == len(declared)
    arrays = {
        name: next(
            array
            for own, array in named.items()
            if name.replace("_E", "_").rstrip("_") == own and array.shape == parameter.shape[1:]
        )
        for name, parameter in declared.items()
    }

    def loss(arrays, x_TD):
        y_TD = kind.apply(arrays, x_TD)
        return jnp.sum(jnp.sin(y_TD)), y_TD

    (_, y_TD), (found, of_x_TD) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        arrays, x_TD
    )
    found = {name.replace("_E", "_").rstrip("_"): array for name, array in found.items()}
    return found | {"x": of_x_TD, "y": y_TD}


def assert_same(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(actual[name], array, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", KINDS)
def test_a_dense_layer_computes_its_kind_on_one_device_and_on_eight(name):
    model, mesh = model_of(name), make_mesh(config.Mesh(data=2, expert=2, model=2), T)
    structure, params = drawn(model)
    wanted = as_one_expert(EXPERTS[name](), params, x_TD())
    assert_same(computed(structure, params, x_TD()), wanted)
    spread = jax.device_put(params, state_shardings(params, mesh))
    with jax.set_mesh(mesh):
        tokens_TD = jax.device_put(x_TD(), batch_sharding(mesh))
        assert_same(computed(structure, spread, tokens_TD), wanted)


@pytest.mark.parametrize("name", ["swiglu", "relu", "reglu"])
def test_all_slices_of_a_dense_layer_together_compute_it(name):
    E, dense = 4, model_of(name)
    moe = config.MoE(
        experts=name,
        num_experts=E,
        hidden_width=F // E,
        router="top_k",
        top_k={"k": E, "straight_through": True, "net": "tanh"},
    )
    structure, params = drawn(dense)
    named = {path[-1]: np.asarray(leaf[...]) for path, leaf in params.flat_state()}
    sparse = MoEFeedForward(dataclasses.replace(dense, moe=moe), rngs=nnx.Rngs(0))
    for expert_name in sparse.expert_names:
        whole = named[expert_name.replace("_E", "_")]
        axis = expert_name.rsplit("_", 1)[1].index("F") - 1 if "2F" not in expert_name else 1
        halves = np.split(whole, 2, axis=1) if "2F" in expert_name else [whole]
        slices = [np.stack(np.split(half, E, axis=axis)) for half in halves]
        experts = np.concatenate(slices, axis=-1) if len(slices) == 2 else slices[0]
        setattr(sparse, expert_name, nnx.Param(jnp.asarray(experts)))
    logits_TE = np.random.default_rng(2).normal(size=(T, E)).astype(np.float32)
    positions = TokenPositions(np.ones((1, T), np.int32), None)
    y_TD, record = sparse(jnp.asarray(x_TD()), logits_TE, positions)
    assert np.all(np.asarray(record.routing.weight_TK) == 1.0)
    wanted_TD = nnx.merge(structure, params)(x_TD())
    np.testing.assert_allclose(y_TD, wanted_TD, rtol=1e-5, atol=1e-5)


def test_lora_stands_beside_any_kind():
    lora = model_of("relu", linear="lora", lora={"rank": 3, "targets": "up"})
    structure, params = drawn(lora)
    named = {path[-1]: leaf for path, leaf in params.flat_state()}
    assert named.keys() == {"up_DF", "up_lora_DR", "up_lora_RF", "down_FD"}
    whole = chosen(lora, "linear").dense("up_DF", {n: named[n][...] for n in named if "up" in n})
    dense, flat = drawn(model_of("relu"))
    flat = nnx.from_flat_state(
        [((path), leaf.replace(whole if path[-1] == "up_DF" else named[path[-1]][...]))
         for path, leaf in flat.flat_state()]
    )  # fmt: skip
    wanted = computed(dense, flat, x_TD())
    found = computed(structure, params, x_TD())
    np.testing.assert_allclose(found["y"], wanted["y"], rtol=1e-5, atol=1e-5)
    assert all(np.any(found[name]) for name in named)


def test_a_parameter_with_an_initializer_of_its_own_begins_as_that_says():
    feed_forward = DenseFeedForward(model_of("biased"), rngs=nnx.Rngs(0))
    assert feed_forward.up_bias_F.shape == (F,)
    assert 0.2 < np.mean(feed_forward.up_bias_F[...]) < 1.8
    assert np.abs(np.mean(feed_forward.up_DF[...])) < 0.1
    scaled = DenseFeedForward(model_of("scaled"), rngs=nnx.Rngs(0))
    assert scaled.down_scale[...] == 1.0
    assert scaled.down_scale.get_metadata("decay") is False


def test_a_mesh_may_not_cut_hidden_units_that_do_not_divide_unless_the_kind_is_never_split():
    sizes = {"expert": 1, "model": 4, "data": 1, "slice": 1}
    check_divides(model_of("biased", hidden_width=6), sizes)
    with pytest.raises(ConfigError, match="hidden_width=6"):
        check_divides(model_of("relu", hidden_width=6), sizes)


def test_export_is_refused_for_dense_layers_that_no_format_has():
    with pytest.raises(CheckpointError, match=r"without config\.model\.activation\."):
        architecture_for(model_of("relu"))
    # A model that has no dense layer computes the same whatever it names.
    sparse = dataclasses.replace(model_of("biased"), moe=config.MoE())
    assert architecture_for(sparse).name == "MoEForCausalLM"


def test_some_layers_may_have_another_kind():
    model = model_of("swiglu", layers="1:activation=relu")
    assert [layer.model.activation for layer in model.by_layer] == ["swiglu", "relu"]
    with pytest.raises(ConfigError, match=r"sets activation=relu in layers that have experts"):
        _ = dataclasses.replace(model, moe=config.MoE()).by_layer
