"""Attention of heads side by side against rotary positions and XLA's attention of heads apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from dynmoe_jax import config
from dynmoe_jax.hardware.target import Target, compile_for
from dynmoe_jax.mesh.axes import MESH_AXES
from dynmoe_jax.mesh.sharding import by_batch_and_head
from dynmoe_jax.model import attention
from dynmoe_jax.model.components import rms_norm
from dynmoe_jax.model.inputs import TokenPositions
from dynmoe_jax.model.kernels.attention.api import xla_attention
from dynmoe_jax.model.kernels.attention.choice import Attend
from dynmoe_jax.model.kernels.attention.flat import (
    flat_attention,
    flat_heads_attention,
    flat_obstacle,
)
from dynmoe_jax.model.kernels.attention.flat_heads import Heads
from dynmoe_jax.model.rotary import rotary_table, rotate
from tests.close import assert_close

B, L, THETA = 2, 384, 10000.0  # three tiles of 128
# Segments that end inside a tile, one that spans all tiles, and padding (0) at the end.
SEGMENTS_BL = np.stack(
    [np.repeat([1, 2, 3, 0], [50, 290, 14, 30]), np.repeat([1, 2], [128, 256])]
).astype(np.int32)
POSITIONS_BL = np.stack([np.r_[0:50, 0:290, 0:14, np.zeros(30)], np.r_[0:128, 1000:1256]]).astype(
    np.int32
)
V5P = Target("tpu", "TPU v5")


def flat_by_positions(query_BLX, key_BLY, value_BLY, segments, positions, width, theta):
    rotary_BLP = None
    if theta is not None:
        with compile_for(V5P):
            rotary_BLP = rotary_table(positions, width, theta)
    return flat_attention(query_BLX, key_BLY, value_BLY, segments, rotary_BLP, width, True)


def draw(heads, kv_heads, width, dtype=jnp.float32, batch=B, length=L):
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (heads, kv_heads, kv_heads, heads)
    return [
        jax.random.normal(key, (batch, length, count * width)).astype(dtype)
        for key, count in zip(keys, counts, strict=True)
    ]


def by_heads_apart(query_BLX, key_BLY, value_BLY, segments, positions, width, theta):
    query, key, value = (
        x.reshape(*x.shape[:2], -1, width) for x in (query_BLX, key_BLY, value_BLY)
    )
    if theta is not None:
        rotary_BLR = rotary_table(positions, width, theta)
        query, key = rotate(query, rotary_BLR), rotate(key, rotary_BLR)
    return xla_attention(query, key, value, segments).reshape(query_BLX.shape)


def value_and_gradients(mix, inputs, dmixed, *rest):
    @jax.jit
    def run(inputs, dmixed, segments, positions):
        def of_inputs(*inputs):
            return mix(*inputs, segments, positions, *rest[2:])

        mixed, pull_back = jax.vjp(of_inputs, *inputs)
        return mixed, *pull_back(dmixed)

    return run(inputs, dmixed, *rest[:2])


# One head to a block of lanes, or two; of a group's query heads all, some, or halves of two groups
# in one block.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "theta"),
    [
        pytest.param(2, 2, 64, THETA, marks=pytest.mark.long),
        (6, 2, 64, THETA),
        (4, 2, 64, None),
        (2, 1, 128, THETA),
        (1, 1, 256, 500.0),
    ],
)
def test_equals_heads_apart(heads, kv_heads, width, theta):
    *inputs, dmixed = draw(heads, kv_heads, width)
    rest = (SEGMENTS_BL, POSITIONS_BL, width, theta)
    actual = value_and_gradients(flat_by_positions, inputs, dmixed, *rest)
    assert_close(actual, value_and_gradients(by_heads_apart, inputs, dmixed, *rest), 1e-5)


@pytest.mark.long
def test_in_bfloat16():
    narrow = draw(4, 2, 64, jnp.bfloat16)
    *wide, wide_dmixed = (x.astype(jnp.float32) for x in narrow)
    *inputs, dmixed = narrow
    rest = (SEGMENTS_BL, POSITIONS_BL, 64, THETA)
    actual = value_and_gradients(flat_by_positions, inputs, dmixed, *rest)
    assert all(x.dtype == jnp.bfloat16 for x in actual)
    assert_close(actual, value_and_gradients(by_heads_apart, wide, wide_dmixed, *rest), 2e-2)


def test_tiles_without_a_common_segment_are_not_computed():
    *inputs, dmixed = draw(2, 2, 64)
    # The second sequence: segment 1 fills the first tile, segment 2 the others.
    poisoned = [x.at[1, :128].set(jnp.nan) for x in inputs]
    rest = (SEGMENTS_BL, POSITIONS_BL, 64, THETA)
    actual = value_and_gradients(flat_by_positions, poisoned, dmixed, *rest)
    wanted = value_and_gradients(flat_by_positions, inputs, dmixed, *rest)
    assert_close([x[1, 128:] for x in actual], [x[1, 128:] for x in wanted], 1e-6)
    assert not np.any(np.isfinite(actual[0][1, :128]))


# Tiles of 512 and of 256, of which half of the keys of the first half of the queries are left out.
@pytest.mark.parametrize(
    ("length", "width"), [pytest.param(512, 64, marks=pytest.mark.long), (768, 64), (512, 128)]
)
def test_halves_of_tiles_on_the_diagonal(length, width):
    *inputs, dmixed = draw(2, 1 if width == 128 else 2, width, batch=1, length=length)
    places = np.repeat([[1, 2]], [300, length - 300], axis=1), np.arange(length)[None]
    rest = (*places, width, THETA)
    actual = value_and_gradients(flat_by_positions, inputs, dmixed, *rest)
    assert_close(actual, value_and_gradients(by_heads_apart, inputs, dmixed, *rest), 1e-5)


def test_pairs_that_are_computed():
    # Six tiles below the diagonal, and three quarters of four on it; tiles of 128 are not halved.
    assert Heads(64, 128, 2048, 1, 512).pairs == 9 * 512**2
    assert Heads(64, 128, 384, 1, 128).pairs == 6 * 128**2


def test_segments_that_differ_in_any_one_bit():
    # Of heads of 64 each bit of an id is a row of a product.
    ids = 5 ^ np.array([0, 1 << 0, 1 << 15, 1 << 16, 1 << 30, -(1 << 31)], np.int32)
    segments_BL = np.stack([np.repeat(ids, 64), np.tile(ids, 64)])
    *inputs, dmixed = draw(2, 2, 64)
    rest = (segments_BL, POSITIONS_BL, 64, THETA)
    actual = value_and_gradients(flat_by_positions, inputs, dmixed, *rest)
    assert_close(actual, value_and_gradients(by_heads_apart, inputs, dmixed, *rest), 1e-5)


def test_heads_that_stand_apart():
    *inputs, _ = (x.reshape(B, L, -1, 64) for x in draw(4, 2, 64))
    actual = flat_heads_attention(*inputs, SEGMENTS_BL, interpret=True)
    assert_close([actual], [xla_attention(*inputs, SEGMENTS_BL)], 1e-5)


def test_each_device_has_its_sequences_and_heads():
    *inputs, dmixed = draw(8, 4, 64)
    rest = (SEGMENTS_BL, POSITIONS_BL, 64, THETA)
    wanted = value_and_gradients(flat_by_positions, inputs, dmixed, *rest)

    def mix(*arrays):
        def local(query_BLX, key_BLY, value_BLY, places):
            return flat_by_positions(query_BLX, key_BLY, value_BLY, *places, 64, THETA)

        return by_batch_and_head(local, *arrays[:3], arrays[3:5])

    with jax.set_mesh(jax.make_mesh((1, 2, 1, 2), MESH_AXES, (AxisType.Auto,) * 4)):
        actual = value_and_gradients(mix, inputs, dmixed, *rest)
        assert len(actual[0].sharding.device_set) == 4
    assert_close(actual, wanted, 1e-6)


@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, marks=pytest.mark.long), {"attention_bias": True, "qk_norm": True}],
    ids=str,
)
def test_a_layer_on_tpu_is_the_layer_on_cpu(monkeypatch, changes):
    model = config.Model(width=64, num_heads=4, num_kv_heads=2, head_width=64, **changes)
    norm, layer = rms_norm(model, nnx.Rngs(0)), attention.Attention(model, rngs=nnx.Rngs(0))
    x_BLD = jax.random.normal(jax.random.key(1), (B, L, 64))

    def gradients(target):
        with compile_for(target):
            places = TokenPositions(SEGMENTS_BL, rotary_table(POSITIONS_BL, 64, model.rope_theta))

        def loss(layer, norm, x_BLD):
            _, heads = layer.project(norm, x_BLD)
            return jnp.sum(jnp.sin(layer.mix(heads, places)))

        return jax.tree.leaves(nnx.jit(nnx.grad(loss, argnums=(0, 1, 2)))(layer, norm, x_BLD))

    wanted = gradients(Target("cpu"))
    calls = []

    def interpreted(*arguments):
        calls.append(arguments)
        return flat_attention(*arguments, interpret=True)

    monkeypatch.setattr(attention, "flat_attention", interpreted)
    layer.attend = Attend("auto", V5P)
    assert_close(gradients(V5P), wanted, 1e-4)
    assert calls


def test_longest_sequences():
    # Two heads of 64 side by side in bfloat16: 45 MB at 4096, twice as much less the tiles at 8192.
    assert not flat_obstacle(4096, 64, 16, 16, jnp.bfloat16)
    assert "8192" in flat_obstacle(8192, 64, 16, 16, jnp.bfloat16)
    assert not flat_obstacle(2048, 64, 16, 16, jnp.float32)
    assert "4096" in flat_obstacle(4096, 64, 16, 16, jnp.float32)
