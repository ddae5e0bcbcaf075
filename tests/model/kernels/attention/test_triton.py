"""The attention kernels for NVIDIA GPUs, in interpret mode, against XLA's attention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.model.kernels.attention.api import xla_attention
from dynmoe_jax.model.kernels.attention.triton import spans, triton_attention
from tests.close import assert_close

L, W = 256, 32
ATTEND = jax.jit(partial(triton_attention, interpret=True))
SEGMENTS_BL = {
    # Segments that end inside a tile, one that spans several, and padding (0) at the end.
    "packed": np.stack(
        [np.repeat([1, 2, 3, 0], [50, 150, 30, 26]), np.repeat([1, 2], [128, 128])]
    ).astype(np.int32),
    # One that goes on after another one.
    "any_order": np.tile(np.repeat([3, 1, 3, 2], 64), (2, 1)).astype(np.int32),
}


def draw(heads, kv_heads, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, L, h, W) for h in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


@partial(jax.jit, static_argnums=0)
def value_and_gradients(attend, query, key, value, mix, segments):
    mixed, pull_back = jax.vjp(lambda *inputs: attend(*inputs, segments), query, key, value)
    return mixed, pull_back(mix)


@pytest.mark.parametrize("segments", list(SEGMENTS_BL))
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
def test_equals_xla(heads, kv_heads, segments):
    inputs = *draw(heads, kv_heads), SEGMENTS_BL[segments]
    wanted = value_and_gradients(xla_attention, *inputs)
    assert_close(value_and_gradients(ATTEND, *inputs), wanted, 1e-5)


def test_bfloat16():
    wide = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in draw(2, 2)]
    narrow = [x.astype(jnp.bfloat16) for x in wide]
    segments = SEGMENTS_BL["packed"]
    actual = value_and_gradients(ATTEND, *narrow, segments)
    assert_close(actual, value_and_gradients(xla_attention, *wide, segments), 2e-2)


def test_tiles_of_other_segments_are_not_read():
    segments = np.repeat([[1, 2]], 128, axis=1).astype(np.int32)
    query, key, value, _ = (x[:1] for x in draw(2, 2))
    mixed = ATTEND(query, key, value.at[:, :128].set(jnp.nan), segments)
    assert np.all(np.isnan(mixed[:, :128]))
    assert np.all(np.isfinite(mixed[:, 128:]))


def test_scores_beyond_the_range_of_exponentials():
    query, key, value, _ = draw(2, 2)
    inputs = 40 * query, 40 * key, value, SEGMENTS_BL["packed"]
    assert_close(ATTEND(*inputs), xla_attention(*inputs), 1e-5)


def test_spans_by_hand():
    # Tiles of 4 queries and 2 keys; the segment 7 is in the last two tiles of queries.
    segments = jnp.array([[5, 5, 5, 5, 6, 6, 7, 7, 7, 7, 7, 7]])
    first_BI, last_BJ = spans(segments, 4, 2)
    np.testing.assert_array_equal(first_BI, [[0, 2, 3]])
    np.testing.assert_array_equal(last_BJ, [[0, 0, 1, 2, 2, 2]])
