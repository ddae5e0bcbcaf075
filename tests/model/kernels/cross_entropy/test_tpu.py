"""The cross-entropy by kernels on TPU, against its twin and a plain formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from dynmoe_jax.hardware.target import Target, compile_for
from dynmoe_jax.mesh.axes import MESH_AXES
from dynmoe_jax.model.kernels.cross_entropy import chunked
from dynmoe_jax.model.kernels.cross_entropy.chunked import cross_entropy_sums
from dynmoe_jax.model.kernels.cross_entropy.tpu import logit_gradients, logit_sums
from dynmoe_jax.model.kernels.cross_entropy.tpu_tiles import Tiles, cross_entropy_tiles
from tests.close import assert_close

B, L, D, V = 3, 200, 128, 700  # 600 tokens fill up 5 tiles of 128; 700 columns 3 tiles of 256
Z_WEIGHT = 0.1
TILES = Tiles(tokens=128, columns=256, chunk=256)
V5P, V6E = Target("tpu", "TPU v5"), Target("tpu", "TPU v6 lite")


def draw(dtype=jnp.float32, batch=B, vocabulary=V):
    """Logits of the size of ten, so that sums of exponentials need their maximum."""
    keys = jax.random.split(jax.random.key(0), 4)
    x_BLD = jax.random.normal(keys[0], (batch, L, D)).astype(dtype)
    output_DV = jax.random.normal(keys[1], (D, vocabulary)).astype(dtype)
    targets_BL = jax.random.randint(keys[2], (batch, L), 0, vocabulary)
    valid_BL = jax.random.bernoulli(keys[3], 0.7, (batch, L))
    return x_BLD, output_DV, targets_BL, valid_BL


def plain(x_BLD, output_DV, targets_BL, valid_BL):
    x_BLD = jnp.where(valid_BL[..., None], x_BLD, 0)
    logits_BLV = jnp.einsum("bld,dv->blv", x_BLD, output_DV, preferred_element_type=jnp.float32)
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    nll_BL = jnp.where(valid_BL, log_z_BL - target_BL, 0.0)
    return jnp.sum(nll_BL) + Z_WEIGHT * jnp.sum(jnp.where(valid_BL, log_z_BL**2, 0.0)), nll_BL


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels run on this CPU, in small tiles, and the twin does not run."""

    def tiles(tokens, *_):
        return Tiles(TILES.tokens, TILES.columns, TILES.chunk)

    monkeypatch.setattr(chunked, "cross_entropy_tiles", tiles)
    monkeypatch.setattr(chunked, "logit_sums", partial(logit_sums, interpret=True))
    monkeypatch.setattr(chunked, "logit_gradients", partial(logit_gradients, interpret=True))
    monkeypatch.setattr(chunked, "_chunked_sums", None)


def by_kernels(*arguments):
    return cross_entropy_sums(*arguments, z_weight=Z_WEIGHT)


def value_and_gradients(function, arguments):
    x_BLD, output_DV, *rest = arguments

    def loss(x_BLD, output_DV):
        total, nll_BL = function(x_BLD, output_DV, *rest)
        return 3 * total, nll_BL  # a cotangent other than one

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return jax.tree.leaves(run(x_BLD, output_DV))


@pytest.mark.parametrize("vocabulary", [V, 768, 256])
def test_equals_the_formula(interpreted, vocabulary):
    arguments = draw(vocabulary=vocabulary)
    actual = value_and_gradients(by_kernels, arguments)
    assert_close(actual, value_and_gradients(plain, arguments))


def test_without_gradients_the_value_is_the_same(interpreted, monkeypatch):
    monkeypatch.setattr(chunked, "logit_gradients", None)
    arguments = draw()
    assert_close(by_kernels(*arguments), plain(*arguments))


def test_in_bfloat16_it_is_as_exact_as_its_twin(interpreted, monkeypatch):
    arguments = draw(jnp.bfloat16)
    kernels = value_and_gradients(by_kernels, arguments)
    monkeypatch.undo()
    twin = value_and_gradients(by_kernels, arguments)
    x_BLD, output_DV, *rest = arguments
    exact = [x_BLD.astype(jnp.float32), output_DV.astype(jnp.float32), *rest]
    wanted = value_and_gradients(plain, exact)
    assert [k.dtype for k in kernels] == [t.dtype for t in twin]

    def errors(found):
        pairs = [
            np.asarray(f, np.float64) - np.asarray(w) for f, w in zip(found, wanted, strict=True)
        ]
        return np.array([np.linalg.norm(pair) for pair in pairs])

    scale = [np.linalg.norm(np.asarray(w)) for w in wanted]
    assert np.all(errors(kernels) <= 1.1 * errors(twin) + 1e-6 * np.array(scale))


def test_positions_that_do_not_count_may_hold_nan(interpreted):
    x_BLD, output_DV, targets_BL, valid_BL = draw()
    poisoned_BLD = jnp.where(valid_BL[..., None], x_BLD, jnp.nan)
    clean = value_and_gradients(by_kernels, (x_BLD, output_DV, targets_BL, valid_BL))
    poisoned = value_and_gradients(by_kernels, (poisoned_BLD, output_DV, targets_BL, valid_BL))
    assert_close(poisoned, clean, 0)


# The batch over two devices; the vocabulary over two as well, 350 columns in two tiles each.
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((1, 2, 1, 1), marks=pytest.mark.long),
        pytest.param((1, 1, 1, 2), marks=pytest.mark.long),
        (1, 2, 1, 2),
    ],
    ids=str,
)
def test_each_device_has_its_tokens_and_its_columns(interpreted, sizes):
    arguments = draw(batch=4)
    wanted = value_and_gradients(plain, arguments)
    with jax.set_mesh(jax.make_mesh(sizes, MESH_AXES, (AxisType.Auto,) * 4)):
        assert_close(value_and_gradients(by_kernels, arguments), wanted)


def test_other_platforms_take_the_twin(monkeypatch):
    monkeypatch.setattr(chunked, "logit_sums", None)
    arguments = draw()
    assert_close(by_kernels(*arguments), plain(*arguments))


def test_tiles():
    bf16 = jnp.bfloat16
    assert cross_entropy_tiles(32768, 1024, 32000, 2048, bf16) is None
    with compile_for(V6E):
        # Four chunks of 2048 tokens together.
        assert cross_entropy_tiles(32768, 1024, 32000, 2048, bf16) == Tiles(1024, 1280, 8192)
        # 5000 tokens are two chunks of three tiles.
        assert cross_entropy_tiles(5000, 1024, 50257, 1024, bf16) == Tiles(1024, 1280, 3072)
        # At most 1500 tokens at a time: one tile.
        assert cross_entropy_tiles(5000, 1024, 32000, 375, bf16) == Tiles(1024, 1280, 1024)
        assert cross_entropy_tiles(5000, 1024, 32000, 75, bf16) == Tiles(256, 1280, 256)
        assert cross_entropy_tiles(100, 1024, 300, 2048, bf16) == Tiles(128, 256, 128)
        assert cross_entropy_tiles(100, 1024, 250, 2048, bf16) is None
        assert cross_entropy_tiles(32768, 1000, 32000, 2048, bf16) is None
        assert cross_entropy_tiles(32768, 1024, 32000, 2048, jnp.float32) is None
        wide = cross_entropy_tiles(32768, 4096, 128256, 2048, bf16)
        assert wide.columns < 1280
    with compile_for(V5P):
        assert cross_entropy_tiles(32768, 1024, 32000, 2048, bf16) == Tiles(1024, 1280, 8192)
