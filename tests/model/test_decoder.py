"""The stack: which layers it has, that the scan is a loop, how it is initialised."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.hardware.native import library
from dynmoe_jax.hardware.target import Target, compile_for
from dynmoe_jax.mesh.make_mesh import make_mesh
from dynmoe_jax.model import Decoder, parameter_shapes
from dynmoe_jax.model.decoder import decoder_shapes, groups_at_a_time
from dynmoe_jax.model.inputs import TokenPositions
from dynmoe_jax.model.parameters import active_parameters, count_parameters
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing import TopP
from tests.close import assert_close

B, L = 2, 8
TOKENS = np.random.default_rng(0).integers(0, 32, (B, L))
SEGMENTS = np.repeat([[1, 2], [1, 0]], [5, 3], axis=1)
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2]] * B)


@nnx.jit
def loss_and_gradients(decoder):
    def loss(decoder):
        output = decoder(TOKENS, SEGMENTS, POSITIONS)
        return jnp.mean(jnp.square(output.logits))

    return nnx.value_and_grad(loss)(decoder)


def shapes_of(model):
    return {path: leaf.shape for path, leaf in parameter_shapes(model).flat_state()}


def test_first_of_every_two_layers_is_moe(small, draw, run):
    model = small(num_layers=4, every_n_layers=2)
    shapes = shapes_of(model)
    assert shapes["groups", "layers", 0, "feed_forward", "gate_up_ED2F"] == (2, 4, 16, 24)
    assert shapes["groups", "layers", 0, "feed_forward", "router_DE"] == (2, 16, 4)
    assert shapes["groups", "layers", 1, "feed_forward", "gate_up_D2F"] == (2, 16, 48)
    assert ("groups", "layers", 1, "feed_forward", "router_DE") not in shapes
    output = run(draw(model), TOKENS, SEGMENTS, POSITIONS)
    assert output.routing.experts_per_token.shape == (2, B, L)


def test_shapes_are_of_the_target_and_each_callers_own(small):
    model = small(dtype="auto")
    ours = decoder_shapes(model)
    with compile_for(Target("tpu", "TPU v5")):
        assert decoder_shapes(model).norm.dtype == jnp.bfloat16
    ours.embedding_VD.set_value(jnp.zeros(1))
    del ours.norm
    again = decoder_shapes(model)
    assert again.norm.dtype == jnp.float32
    assert again.embedding_VD.shape == (32, 16)


def test_dense_model_has_no_routing(small, draw, run):
    model = small(every_n_layers=0)
    assert not any("router_DE" in path or "gate_up_ED2F" in path for path in shapes_of(model))
    assert shapes_of(model)["groups", "layers", 0, "feed_forward", "down_FD"] == (2, 24, 16)
    output = run(draw(model), TOKENS, SEGMENTS, POSITIONS)
    assert output.routing is None
    assert output.logits.shape == (B, L, 32)


def test_the_loop_over_layers_keeps_no_copy_of_the_experts(small, draw):
    structure, params = nnx.split(draw(small()))

    def logits(params):
        return nnx.merge(structure, params)(TOKENS, SEGMENTS, POSITIONS).logits

    program = jax.make_jaxpr(lambda params: jax.vjp(logits, params)[0])(params)
    stacked = shapes_of(small())["groups", "layers", 0, "feed_forward", "gate_up_ED2F"]
    loop = next(e for e in program.eqns if e.primitive.name == "scan")
    assert stacked in [read.aval.shape for read in loop.invars]
    assert stacked not in [kept.aval.shape for kept in loop.outvars]


@pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
@pytest.mark.parametrize("unroll", [1, 3])
def test_no_layers_experts_are_copied_out_of_their_stack(small, draw, unroll):
    structure, params = nnx.split(draw(small(num_layers=3, unroll=unroll)))

    def loss(params):
        return jnp.sum(nnx.merge(structure, params)(TOKENS, SEGMENTS, POSITIONS).logits ** 2)

    text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    assert "dynmoe_experts" in text
    # Of one layer, gate_up is [4, 16, 24] and down [4, 12, 16].
    assert not re.findall(r"= f32\[(?:1,)?4,(?:16,24|12,16)\]\S* (?:dynamic-)?slice\(", text)


def test_tied_embeddings(small, draw, run):
    tied, untied = draw(small(tie_embeddings=True)), draw(small())
    assert not hasattr(tied, "head_DV")
    untied_state = nnx.state(untied)
    for path, leaf in nnx.state(tied).flat_state():
        target = untied_state
        for key in path:
            target = target[key]
        target.set_value(leaf[...])
    nnx.update(untied, untied_state)
    untied.head_DV.set_value(tied.embedding_VD[...].T)
    np.testing.assert_allclose(
        run(tied, TOKENS, SEGMENTS, POSITIONS).logits,
        run(untied, TOKENS, SEGMENTS, POSITIONS).logits,
        rtol=1e-5,
        atol=1e-6,
    )


def test_rematerialisation_changes_no_gradient(small, draw):
    plain_loss, plain = loss_and_gradients(draw(small()))
    for remat in ("elementwise", "dots", "layer"):
        loss, gradients = loss_and_gradients(draw(small(remat=remat)))
        np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
        assert_close(gradients, plain, 1e-5)


def test_unrolled_layers_compute_the_same(small, draw):
    loss, gradients = loss_and_gradients(draw(small(num_layers=3, unroll=1)))
    for unroll in (2, 3):
        unrolled_loss, unrolled = loss_and_gradients(draw(small(num_layers=3, unroll=unroll)))
        np.testing.assert_allclose(unrolled_loss, loss, rtol=1e-6)
        assert_close(unrolled, gradients, 1e-5)


def test_nothing_is_unrolled_on_a_mesh(monkeypatch, small):
    monkeypatch.setattr(library, "available", lambda: True)
    with jax.set_mesh(make_mesh(config.Mesh(data=2), 4, jax.devices()[:2])):
        assert groups_at_a_time(small(), 4) == 1


def test_scan_equals_a_loop_over_layers(small, draw, run):
    decoder = draw(small(num_layers=4, every_n_layers=2))

    @nnx.jit
    def looped(decoder):
        x_BLD = decoder.embedding_VD[...][TOKENS]
        structure, params = nnx.split(decoder.groups)
        for i in range(2):
            group = nnx.merge(structure, jax.tree.map(lambda leaf, i=i: leaf[i], params))
            for layer in group.layers:
                x_BLD = layer(x_BLD, TokenPositions(SEGMENTS, decoder.rotary(POSITIONS))).x_BLD
        return decoder.norm(x_BLD) @ decoder.head_DV[...]

    np.testing.assert_allclose(
        run(decoder, TOKENS, SEGMENTS, POSITIONS).logits, looped(decoder), rtol=1e-5, atol=1e-5
    )


def test_one_expert_with_its_gate_at_one_is_the_dense_model(small, draw, run):
    router = {"router": "top_k", "top_k": {"k": 1, "renormalize": True}}
    moe = config.MoE(**router, num_experts=1, hidden_width=24, backend="grouped")
    mixture, dense = draw(small(moe=moe)), draw(small(every_n_layers=0))
    source, target = mixture.groups.layers[0], dense.groups.layers[0]
    for name in ("attention", "attention_norm", "feed_forward_norm"):
        nnx.update(getattr(target, name), nnx.state(getattr(source, name)))
    target.feed_forward.gate_up_D2F.set_value(source.feed_forward.gate_up_ED2F[:, 0])
    target.feed_forward.down_FD.set_value(source.feed_forward.down_EFD[:, 0])
    for name in ("embedding_VD", "head_DV"):
        getattr(dense, name).set_value(getattr(mixture, name)[...])
    nnx.update(dense.norm, nnx.state(mixture.norm))
    valid_BL = SEGMENTS > 0
    np.testing.assert_allclose(
        run(mixture, TOKENS, SEGMENTS, POSITIONS).logits[valid_BL],
        run(dense, TOKENS, SEGMENTS, POSITIONS).logits[valid_BL],
        rtol=1e-5,
        atol=1e-5,
    )


@dataclasses.dataclass(frozen=True)
class LookAhead(TopP):
    """A router that says of itself that it looks at later tokens."""

    causal = False


@dataclasses.dataclass(frozen=True)
class LookAheadInTraining(TopP):
    """A router that looks at later tokens while it is trained."""

    causal_in_training = False


def test_router_that_looks_ahead_in_training_alone_is_refused_and_may_write(small):
    with ROUTERS.temporarily("ahead", LookAheadInTraining):
        with pytest.raises(config.ConfigError, match="looks at later tokens, in training; use"):
            parameter_shapes(small(router="ahead"))
        assert not small(router="ahead", allow_non_causal=True).looks_ahead
    with ROUTERS.temporarily("ahead", LookAhead):
        assert "'ahead' looks at later tokens" in small(router="ahead").looks_ahead


def test_router_that_looks_ahead_is_refused_unless_it_is_asked_for(small):
    with ROUTERS.temporarily("ahead", LookAhead):
        with pytest.raises(config.ConfigError, match="router='ahead' looks at later tokens"):
            parameter_shapes(small(router="ahead"))
        assert parameter_shapes(small(router="ahead", allow_non_causal=True))


def test_parameter_counts(small):
    # D=16, V=32, H W = 16, G W = 8: attention 2 16 16 + 2 16 8 = 768; an expert 3 16 12 = 576;
    # a dense feed-forward 3 16 24 = 1152; a router 16 4 = 64; norms 16 each.
    model = small(num_layers=4, every_n_layers=2)
    rest = 2 * 32 * 16 + 4 * (768 + 2 * 16) + 16 + 2 * 64 + 2 * 1152
    assert count_parameters(model) == rest + 2 * 4 * 576
    assert active_parameters(model, 1) == rest + 2 * 576
    assert active_parameters(model, 2.5) == rest + 5 * 576
    # Tying takes one of the two tables away.
    assert count_parameters(small(tie_embeddings=True)) == count_parameters(small()) - 32 * 16


@pytest.fixture(scope="module")
def initialise(small):
    """seed -> parameters by path, as the paper draws them."""
    model = small(width=64, vocab_size=256, hidden_width=64, init_std=0.006)
    init = jax.jit(lambda key: nnx.state(Decoder(model, rngs=nnx.Rngs(key))))
    return lambda seed: {
        p: np.asarray(leaf[...]) for p, leaf in init(jax.random.key(seed)).flat_state()
    }


def test_initial_parameters(initialise):
    parameters, again, other = initialise(0), initialise(0), initialise(1)
    for path, values in parameters.items():
        np.testing.assert_array_equal(values, again[path])
        if path[-1] == "scale":
            np.testing.assert_array_equal(values, 1.0)
            continue
        assert values.dtype == np.float32
        # The standard error of a standard deviation is std / sqrt(2 n): four of them.
        bound = 4 / np.sqrt(2 * values.size)
        assert abs(values.std() / 0.006 - 1) < bound, path
        assert abs(values.mean()) < 4 * 0.006 / np.sqrt(values.size), path
        assert np.all(values != other[path])


def test_every_layer_matrix_and_expert_is_drawn_on_its_own(initialise):
    parameters = initialise(0)
    arrays = [values for path, values in parameters.items() if path[-1] != "scale"]
    drawn = np.concatenate([values.ravel() for values in arrays])
    # Two equal float32 draws among n are rare; a repeated layer would repeat thousands.
    assert len(np.unique(drawn)) > 0.9 * len(drawn)
