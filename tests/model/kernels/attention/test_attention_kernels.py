"""Attention kernels against XLA's, and the rule that picks one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType

from dynmoe_jax import config
from dynmoe_jax.hardware.native import library
from dynmoe_jax.hardware.target import Target
from dynmoe_jax.model.kernels.attention.api import splash_attention, splash_block, xla_attention
from dynmoe_jax.model.kernels.attention.choice import KERNELS, choose_attention, make_attention
from dynmoe_jax.model.kernels.attention.native import native_attention
from dynmoe_jax.model.kernels.attention.tiled import tile_edges, tiled_attention
from tests.close import assert_close

CPU = Target("cpu", "cpu")
V4 = Target("tpu", "TPU v4")
V5P = Target("tpu", "TPU v5")
H100 = Target("gpu", "NVIDIA H100 80GB HBM3", 9.0)
A100 = Target("gpu", "NVIDIA A100-SXM4-80GB", 8.0)
RTX = Target("gpu", "NVIDIA GeForce RTX 4090", 8.9)
V100 = Target("gpu", "Tesla V100-SXM2-16GB", 7.0)
AMD = Target("gpu", "AMD Instinct MI300X")

L, WIDTH = 256, 16
# Segments that end inside a tile, one that spans two, and padding (0) at the end.
SEGMENTS_BL = np.stack(
    [np.repeat([1, 2, 3, 0], [50, 150, 30, 26]), np.repeat([1, 2], [128, 128])]
).astype(np.int32)
needs_native = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
SPLASH = partial(splash_attention, interpret=True)


def draw(heads, kv_heads, dtype=jnp.float32, batch=2):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(batch, L, h, WIDTH) for h in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def value_and_gradients(attend, query, key, value, mix, segments=SEGMENTS_BL):
    def loss(query, key, value):
        mixed = attend(query, key, value, segments)
        return jnp.sum(mixed.astype(jnp.float32) * mix.astype(jnp.float32)), mixed

    run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, mixed), gradients = jax.jit(run)(query, key, value)
    return mixed, gradients


@pytest.mark.parametrize(
    ("heads", "kv_heads"),
    [
        pytest.param(2, 2, marks=pytest.mark.long),
        (4, 2),
        pytest.param(2, 1, marks=pytest.mark.long),
    ],
)
def test_splash_equals_xla(heads, kv_heads):
    inputs = draw(heads, kv_heads)
    assert_close(
        value_and_gradients(SPLASH, *inputs), value_and_gradients(xla_attention, *inputs), 1e-5
    )


@pytest.mark.long
def test_splash_in_bfloat16():
    wide = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in draw(2, 2)]
    narrow = [x.astype(jnp.bfloat16) for x in wide]
    actual, wanted = value_and_gradients(SPLASH, *narrow), value_and_gradients(xla_attention, *wide)
    assert_close(actual, wanted, 2e-2)


def test_splash_on_a_mesh():
    inputs = draw(2, 1, batch=4)
    segments = np.concatenate([SEGMENTS_BL, SEGMENTS_BL[::-1]])
    wanted = value_and_gradients(xla_attention, *inputs, segments=segments)
    with jax.set_mesh(jax.make_mesh((4,), ("data",), (AxisType.Auto,))):
        actual = value_and_gradients(SPLASH, *inputs, segments=segments)
        assert len(actual[0].sharding.device_set) == 4
    assert_close(actual, wanted, 1e-5)


@pytest.mark.parametrize(
    "attend", [tiled_attention, pytest.param(native_attention, marks=needs_native)]
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("length", [2, 37, 200, 256])
def test_kernels_for_cpus_equal_xla(attend, heads, kv_heads, length):
    inputs = [x[:, :length] for x in draw(heads, kv_heads)]
    segments = SEGMENTS_BL[:, :length]
    assert_close(
        value_and_gradients(attend, *inputs, segments=segments),
        value_and_gradients(xla_attention, *inputs, segments=segments),
        1e-5,
    )


@needs_native
def test_native_with_segments_in_any_order():
    # A segment that goes on after another one: keys between the two belong to neither tile's span.
    segments = np.tile(np.repeat([3, 1, 3, 2], 32), (2, 2)).astype(np.int32)
    inputs = draw(2, 1)
    assert_close(
        value_and_gradients(native_attention, *inputs, segments=segments),
        value_and_gradients(xla_attention, *inputs, segments=segments),
        1e-5,
    )


@needs_native
def test_native_does_not_read_other_segments():
    # From the first tile of the second segment on: tiles start at the first of their segments.
    segments = np.repeat([[1, 2]], 128, axis=1).astype(np.int32)
    query, key, value, _ = (x[:1] for x in draw(2, 2))
    value = value.at[:, :128].set(jnp.nan)
    mixed = jax.jit(native_attention)(query, key, value, segments)
    assert np.all(np.isnan(mixed[:, :128]))
    assert np.all(np.isfinite(mixed[:, 128:]))


@needs_native
def test_native_with_scores_beyond_the_range_of_exponentials():
    query, key, value, mix = draw(2, 2)
    inputs = 40 * query, 40 * key, value, mix
    actual = jax.jit(native_attention)(*inputs[:3], SEGMENTS_BL)
    assert_close(actual, xla_attention(*inputs[:3], SEGMENTS_BL), 1e-5)


def test_tiled_in_bfloat16():
    wide = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in draw(4, 2)]
    narrow = [x.astype(jnp.bfloat16) for x in wide]
    actual = value_and_gradients(tiled_attention, *narrow)
    assert_close(actual, value_and_gradients(xla_attention, *wide), 2e-2)


def test_tiled_never_holds_all_pairs():
    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (out.aval.shape for out in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from shapes(inner)

    def run(*inputs):
        return value_and_gradients(tiled_attention, *inputs)

    found = list(shapes(jax.make_jaxpr(run)(*draw(2, 2)).jaxpr))
    assert any(shape[-2:] == (64, L) for shape in found)
    assert not any(shape[-2:] == (L, L) for shape in found)


def test_tiles_of_queries_cover_the_sequence():
    assert tile_edges(37) == [(0, 37)]
    assert tile_edges(200) == [(0, 64), (64, 128), (128, 192), (192, 200)]
    assert tile_edges(1024) == [(i, i + 128) for i in range(0, 1024, 128)]


def test_tiles_that_divide_the_length():
    assert splash_block(2048) == 512
    assert splash_block(768) == 256
    assert splash_block(384) == 128
    assert splash_block(200) is None


BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(
    ("target", "dtype", "length", "width", "wanted"),
    [
        pytest.param(CPU, F32, 37, 20, "native", marks=needs_native),
        (CPU, BF16, 37, 20, "tiled"),
        (V5P, BF16, 2048, 64, "flat"),
        (V5P, F32, 384, 128, "flat"),
        (V4, BF16, 2048, 64, "splash"),
        (V5P, BF16, 8192, 64, "splash"),
        (V5P, BF16, 2048, 96, "splash"),
        (V5P, BF16, 200, 64, "xla"),
        (H100, BF16, 2048, 64, "triton"),
        (H100, BF16, 2048, 128, "triton"),
        (RTX, BF16, 2048, 64, "triton"),
        (RTX, BF16, 2048, 128, "cudnn"),
        (H100, BF16, 2048, 256, "cudnn"),
        (H100, BF16, 2000, 64, "cudnn"),
        (H100, F32, 2048, 64, "xla"),
        (H100, BF16, 2047, 64, "xla"),
        (H100, BF16, 2048, 68, "xla"),
        (A100, BF16, 2048, 128, "triton"),
        (A100, BF16, 2048, 96, "cudnn"),
        (A100, BF16, 2048, 136, "xla"),
        (V100, BF16, 2048, 64, "xla"),
        (AMD, BF16, 2048, 64, "xla"),
    ],
)
def test_auto(target, dtype, length, width, wanted):
    assert choose_attention("auto", target, dtype, length, width, 4, 2) == wanted


@pytest.mark.parametrize(
    ("requested", "target", "dtype", "length", "width", "message"),
    [
        ("splash", CPU, BF16, 2048, 64, "'splash' needs a TPU, and this is a CPU; use"),
        ("native", H100, F32, 2048, 64, "'native' needs a CPU, and this is a GPU; use"),
        ("native", CPU, BF16, 2048, 64, "needs config.model.dtype='float32', not bfloat16; use"),
        ("triton", V5P, BF16, 2048, 64, "'triton' needs a GPU, and this is a TPU; use"),
        ("triton", H100, F32, 2048, 64, "needs config.model.dtype='bfloat16', not float32; use"),
        ("triton", H100, BF16, 2048, 96, "head_width of 32, 64, 128 here, not 96; use"),
        ("triton", RTX, BF16, 2048, 128, "head_width of 32, 64 here, not 128; use"),
        ("triton", H100, BF16, 2000, 64, "a multiple of 128 positions, not 2000; use"),
        ("triton", V100, BF16, 2048, 64, "compute capability 8.0 or more; use"),
        ("cudnn", V5P, BF16, 2048, 64, "'cudnn' needs a GPU, and this is a TPU; use"),
        ("tokamax", CPU, BF16, 2048, 64, "'tokamax' needs a GPU or TPU, and this is a CPU; use"),
        ("splash", V5P, BF16, 200, 64, "a multiple of 128 positions, not 200; use"),
        ("flat", CPU, BF16, 2048, 64, "'flat' needs a TPU, and this is a CPU; use"),
        ("flat", V4, BF16, 2048, 64, "fast memory holds whole sequences, v5 or later; use"),
        ("flat", V5P, BF16, 2048, 96, "of 64 or a multiple of 128, not 96; use"),
        ("flat", V5P, BF16, 2048, 64, "heads that fill blocks of 128 lanes on each device, not 4 "),
        ("flat", V5P, BF16, 200, 128, "a multiple of 128 positions, not 200; use"),
        ("flat", V5P, BF16, 8192, 128, "fit into 58720256 bytes of fast memory, not 8192 "),
        ("cudnn", H100, F32, 2048, 64, "needs config.model.dtype='bfloat16', not float32; use"),
        ("cudnn", H100, BF16, 2048, 300, "a multiple of 8 up to 256, not 300; use"),
        ("cudnn", H100, BF16, 2047, 64, "an even number of positions, not 2047; use"),
        ("cudnn", V100, BF16, 2048, 64, "compute capability 8.0 or more; use"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    requested, target, dtype, length, width, message
):
    with pytest.raises(config.ConfigError, match=message) as caught:
        choose_attention(requested, target, dtype, length, width, 4, 1)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"config.model.attention={requested!r}")


def test_the_wrong_platform_is_refused_when_the_model_is_made():
    with pytest.raises(config.ConfigError, match="needs a TPU"):
        make_attention("splash", CPU)


def test_the_rule_is_followed_when_attention_is_traced(monkeypatch):
    called = []
    for name in KERNELS:
        monkeypatch.setitem(KERNELS, name, lambda *_, name=name: called.append(name))
    make_attention("auto", V5P)(*draw(2, 2, BF16)[:3], SEGMENTS_BL)
    make_attention("auto", H100)(*draw(2, 2, BF16)[:3], SEGMENTS_BL)
    make_attention("auto", CPU)(*draw(2, 2, BF16)[:3], SEGMENTS_BL)
    # Heads of 16.
    assert called == ["splash", "cudnn", "tiled"]


@pytest.mark.parametrize(("kv_heads", "flat"), [(2, True), (1, False)])
def test_heads_stay_side_by_side_where_they_fill_blocks(kv_heads, flat):
    query = jax.ShapeDtypeStruct((2, 256, 4 * 64), BF16)
    key = jax.ShapeDtypeStruct((2, 256, kv_heads * 64), BF16)
    assert make_attention("auto", V5P).takes_flat(query, key, 64) == flat
    assert not make_attention("auto", H100).takes_flat(query, key, 64)
    assert not make_attention("auto", CPU).takes_flat(query, key, 64)


def test_the_same_settings_give_the_same_function():
    assert make_attention("auto", CPU) is make_attention("auto", CPU)


def test_every_choice_has_a_kernel():
    field = config.Model.__dataclass_fields__["attention"]
    assert set(field.metadata["choices"]) == {"auto", *KERNELS}
