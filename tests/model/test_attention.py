"""Attention against the formula, written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from dynmoe_jax import config
from dynmoe_jax.hardware.target import Target, compile_for
from dynmoe_jax.mesh.axes import MESH_AXES
from dynmoe_jax.mesh.collectives import keep_all_but_gathered
from dynmoe_jax.model.attention import Attention
from dynmoe_jax.model.components import rms_norm
from dynmoe_jax.model.decoder import Layer
from dynmoe_jax.model.inputs import TokenPositions
from dynmoe_jax.model.rotary import rotary_table, rotate

B, L = 2, 7


def rotate_by_complex_numbers(x_BLHW, positions_BL, theta):
    """Component i and i + W/2 are one complex number, turned by exp(i position theta^(-2i/W))."""
    half = x_BLHW.shape[-1] // 2
    number = x_BLHW[..., :half].astype(np.complex128) + 1j * x_BLHW[..., half:]
    frequency = theta ** (-2 * np.arange(half) / (2 * half))
    turned = number * np.exp(1j * positions_BL[:, :, None, None] * frequency)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_rope(theta):
    random = np.random.default_rng(0)
    x_BLHW = random.normal(size=(B, L, 3, 8)).astype(np.float32)
    positions_BL = random.integers(0, 2000, (B, L))

    @jax.jit
    def turn(x_BLHW, positions_BL):
        return rotate(x_BLHW, rotary_table(positions_BL, 8, theta))

    wanted = rotate_by_complex_numbers(x_BLHW, positions_BL, theta)
    np.testing.assert_allclose(turn(x_BLHW, positions_BL), wanted, rtol=0, atol=2e-3)
    near = rotate_by_complex_numbers(x_BLHW, positions_BL % 20, theta)
    np.testing.assert_allclose(turn(x_BLHW, positions_BL % 20), near, rtol=0, atol=1e-5)


def test_the_table_repeats_angles_for_heads_that_share_lanes():
    positions_BL = np.array([[0, 3, 1000]])
    table_BLR = rotary_table(positions_BL, 64, 500.0)
    with compile_for(Target("tpu", "TPU v5")):
        on_tpu_BLR = rotary_table(positions_BL, 64, 500.0)
        assert rotary_table(positions_BL, 128, 500.0).shape == (1, 3, 128)
        assert rotary_table(positions_BL, 48, 500.0).shape == (1, 3, 48)
    cos, sin = np.split(np.asarray(table_BLR), 2, axis=-1)
    np.testing.assert_array_equal(on_tpu_BLR, np.concatenate([cos, cos, sin, sin], axis=-1))
    np.testing.assert_allclose(cos[0, 1, :2], np.cos([3, 3 * 500 ** (-1 / 32)]), rtol=1e-6)
    x_BLHW = np.random.default_rng(0).normal(size=(1, 3, 2, 64)).astype(np.float32)
    np.testing.assert_array_equal(rotate(x_BLHW, on_tpu_BLR), rotate(x_BLHW, table_BLR))


def rms(x_BLHW):
    """Of all heads of a position together."""
    return np.sqrt(np.mean(np.square(x_BLHW), axis=(2, 3), keepdims=True))


def attention_by_hand(attention, x_BLD, segment_BL, positions_BL, theta):
    """Loops over batch and heads; key/value heads repeated by hand for their query heads."""
    weights = {name: np.asarray(getattr(attention, name)[...], np.float64) for name in NAMES}
    q, k, v = (np.einsum("bld,dhw->blhw", x_BLD, weights[name]) for name in NAMES[:3])
    if attention.bias:
        q = q + np.asarray(attention.query_bias_HW)
        k = k + np.asarray(attention.key_bias_GW)
        v = v + np.asarray(attention.value_bias_GW)
    if attention.norm:
        q = np.asarray(attention.query_scale_HW) * q / rms(q)
        k = np.asarray(attention.key_scale_GW) * k / rms(k)
    q = rotate_by_complex_numbers(q, positions_BL, theta)
    k = rotate_by_complex_numbers(k, positions_BL, theta)
    shared = q.shape[2] // k.shape[2]
    mixed = np.zeros_like(q)
    for b in range(x_BLD.shape[0]):
        for h in range(q.shape[2]):
            score = q[b, :, h] @ k[b, :, h // shared].T / np.sqrt(q.shape[-1])
            later = np.arange(L)[:, None] < np.arange(L)[None]
            other = segment_BL[b][:, None] != segment_BL[b][None]
            score[later | other] = -np.inf
            share = np.exp(score - score.max(axis=-1, keepdims=True))
            share /= share.sum(axis=-1, keepdims=True)
            mixed[b, :, h] = share @ v[b, :, h // shared]
    return np.einsum("blhw,hwd->bld", mixed, weights["output_HWD"])


NAMES = ["query_DHW", "key_DGW", "value_DGW", "output_HWD"]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 1},
        {"num_kv_heads": 2},
        {"num_kv_heads": 4},
        {"attention_bias": True},
        {"qk_norm": True},
        {"attention_bias": True, "qk_norm": True},
    ],
    ids=str,
)
def test_grouped_query_attention(small, draw, changes):
    decoder = draw(small(**changes))
    layers = nnx.state(decoder.groups.layers[0])
    structure = nnx.graphdef(nnx.eval_shape(lambda: Layer(decoder.config, True, rngs=nnx.Rngs(0))))
    layer = nnx.merge(structure, jax.tree.map(lambda leaf: leaf[0], layers))
    random = np.random.default_rng(1)
    x_BLD = random.normal(size=(B, L, 16)).astype(np.float32)
    segment_BL = np.array([[1] * 4 + [2] * 3, [1] * 7])
    positions_BL = np.array([[0, 1, 2, 3, 0, 1, 2], list(range(7))])
    positions = TokenPositions(segment_BL, decoder.rotary(positions_BL))

    @nnx.jit
    def attend(layer, x_BLD, positions):
        _, heads = layer.attention.project(layer.attention_norm, x_BLD)
        return layer.attention.mix(heads, positions)

    actual = attend(layer, x_BLD, positions)
    normed_BLD = x_BLD / np.sqrt(
        np.mean(x_BLD**2, axis=-1, keepdims=True) + decoder.config.norm_epsilon
    )
    normed_BLD *= np.asarray(layer.attention_norm.scale[...])
    theta = decoder.config.rope_theta
    wanted = attention_by_hand(layer.attention, normed_BLD, segment_BL, positions_BL, theta)
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=2e-5)


def test_matrices_that_were_put_together_are_not_kept_for_backward(capsys):
    model = config.Model(width=48, num_heads=4, num_kv_heads=4, head_width=16)
    layer = {"norm": rms_norm(model, nnx.Rngs(0)), "attention": Attention(model, rngs=nnx.Rngs(0))}
    structure, params = nnx.split(nnx.Dict(layer))
    x_BLD = jnp.ones((4, 8, 48))
    positions_BL = jnp.ones((4, 8), jnp.int32)
    positions = TokenPositions(positions_BL, rotary_table(positions_BL, 16, 500.0))

    def layer(params, x_BLD):
        module = nnx.merge(structure, params)
        x_BLD, heads = module["attention"].project(module["norm"], x_BLD)
        return module["attention"].mix(heads, positions)

    kept = jax.checkpoint(layer, policy=keep_all_but_gathered)
    with jax.set_mesh(jax.make_mesh((1, 4, 1, 1), MESH_AXES, (AxisType.Auto,) * 4)):
        jax.ad_checkpoint.print_saved_residuals(kept, params, x_BLD)
    printed = capsys.readouterr().out.splitlines()
    computed = [line for line in printed if "from the argument" not in line]
    assert any("f32[4,8,48]" in line for line in printed)
    assert any("f32[4,8,64]" in line for line in computed)  # mixed values
    shapes = ("f32[48,64]", "f32[64,48]", "f32[48,4,16]", "f32[4,16,48]")
    assert not [line for line in computed if line.startswith(shapes)]
