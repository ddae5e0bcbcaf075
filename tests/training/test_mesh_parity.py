"""On any mesh the loss, every gradient and the parameters are those of one device."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.mesh.axes import MESH_AXES
from dynmoe_jax.mesh.make_mesh import batch_sharding, make_mesh, state_shardings
from dynmoe_jax.model import Decoder
from dynmoe_jax.training.step import StepGradients, TrainState

pytestmark = pytest.mark.slow

B, L, V = 8, 8, 32
MODEL = config.Model(
    num_layers=2,
    width=16,
    num_heads=8,
    num_kv_heads=8,
    head_width=2,
    hidden_width=24,
    vocab_size=V,
    max_seq_len=L,
    init_std=0.3,
    moe=config.MoE(num_experts=8, hidden_width=8, top_p={"threshold": 0.6}),
)
LOSS = config.Loss(
    entropy={"weight": 0.05}, router_z={"weight": 0.02}, z_weight=0.01, chunk_tokens=16
)
TOP_P = config.Config(
    model=MODEL,
    data=config.Data(seq_len=L),
    loss=LOSS,
    train=config.Train(batch_size=B),
)


def changed(cfg, **moe):
    moe = dataclasses.replace(cfg.model.moe, **moe)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))


CASES = {
    "top_p": TOP_P,
    "top_k": changed(TOP_P, router="top_k", top_k={"k": 2, "renormalize": True}, top_p={}),
    # Every other layer dense; the exchange instead of the ring.
    "exchange": changed(TOP_P, transport="all_to_all", every_n_layers=2),
}


def meshes(devices):
    """Sizes along (slice, data, expert, model) of ``devices``: of eight, every three axes of 2.

    So every pair of axes meets, beside each of the two others.
    """
    sizes = itertools.product((1, 2), repeat=4)
    return [s for s in sizes if math.prod(s) == devices]


def batch():
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, V, (2, B, L)).astype(np.int32)
    # Rows of unequal lengths; the last two are nothing but padding, all that a device has of 4.
    length = np.array([8, 3, 8, 5, 1, 8, 0, 0])
    segments = (np.arange(L) < length[:, None]).astype(np.int32)
    positions = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    return {"tokens": tokens, "targets": targets, "segment_ids": segments, "positions": positions}


def draw(model):
    """Parameters; four experts share a router column, so that top-2 never takes the last two."""
    params = nnx.state(Decoder(model, rngs=nnx.Rngs(params=jax.random.key(1))), nnx.Param)
    router = params["groups"]["layers"][0]["feed_forward"]["router_DE"]
    alike_NDE = jnp.broadcast_to(router[...][..., 4:5], (*router.shape[:-1], 4))
    params["groups"]["layers"][0]["feed_forward"]["router_DE"] = router.replace(
        router[...].at[..., 4:].set(alike_NDE)
    )
    return params


def gradients_of(cfg):
    """(params, batch) -> (gradients, (parts of the loss, counts)) of the first step."""
    compute = StepGradients(cfg)

    def gradients(params, batch):
        state = TrainState(jnp.int32(0), params, None)
        found, (parts, sums) = compute(state, batch)
        return found, (parts, compute.loss.counts(sums))

    return gradients


@pytest.fixture(scope="module")
def wanted():
    """(gradients, (losses, counts)) of one device, by case."""
    return {
        name: jax.jit(gradients_of(cfg))(draw(cfg.model), batch()) for name, cfg in CASES.items()
    }


def on_mesh(cfg, sizes):
    devices = jax.devices()[: math.prod(sizes)]
    mesh = make_mesh(config.Mesh(**dict(zip(MESH_AXES, sizes, strict=True))), B, devices)
    with jax.set_mesh(mesh):
        init = lambda: draw(cfg.model)  # noqa: E731
        placed = state_shardings(jax.eval_shape(init), mesh)
        params = jax.jit(init, out_shardings=placed)()
        gradients = jax.jit(gradients_of(cfg), out_shardings=(placed, None))
        return params, gradients(params, jax.device_put(batch(), batch_sharding(mesh)))


def assert_same(actual, wanted, rtol=1e-5):
    for (path, a), w in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(wanted), strict=True
    ):
        a, w = np.asarray(a, np.float64), np.asarray(w, np.float64)
        assert np.linalg.norm(a - w) <= rtol * max(np.linalg.norm(w), 1e-6), path


def check(case, sizes, wanted):
    params, (gradients, (losses, counts)) = on_mesh(CASES[case], sizes)
    gradients_1, (losses_1, counts_1) = wanted[case]
    assert_same(params, draw(CASES[case].model), 1e-7)
    assert_same(losses, losses_1)
    assert_same(gradients, gradients_1)
    assert_same(counts, counts_1, 0)
    return params


def check_pieces(params, sizes):
    """Slices have copies; all other axes cut the parameter in as many pieces as they are long."""
    pieces = sizes[1] * sizes[2] * sizes[3]
    weights = params["groups"]["layers"][0]["feed_forward"]["down_EFD"][...]
    for values in (params["embedding_VD"][...], weights):
        assert values.addressable_shards[0].data.size * pieces == values.size


@pytest.mark.parametrize(
    "sizes",
    [s if s[1] == s[3] else pytest.param(s, marks=pytest.mark.long) for s in meshes(8)],
    ids=str,
)
def test_top_p(sizes, wanted):
    """Axes of two devices, and pairs of them, are among these."""
    check_pieces(check("top_p", sizes, wanted), sizes)


@pytest.mark.parametrize(
    ("case", "sizes"), [("top_k", (1, 2, 2, 2)), ("exchange", (2, 1, 4, 1))], ids=str
)
def test_other_routers_and_transports(case, sizes, wanted):
    check(case, sizes, wanted)


def test_two_experts_are_empty(wanted):
    load_NE = wanted["top_k"][1][1].load_NE
    assert np.all(np.asarray(load_NE)[:, 6:] == 0)
    assert np.all(np.asarray(load_NE)[:, :6].sum(axis=-1) == 2 * (batch()["segment_ids"] > 0).sum())


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 2, 1)], ids=str)
def test_microbatches_give_the_gradient_of_the_whole_batch(sizes, wanted):
    """The balance loss too, which is no mean over microbatches."""
    cfg = dataclasses.replace(TOP_P, train=config.Train(batch_size=B, microbatches=2))
    _, (gradients, (losses, counts)) = on_mesh(cfg, sizes)
    gradients_1, (losses_1, counts_1) = wanted["top_p"]
    assert_same(losses, losses_1)
    assert_same(gradients, gradients_1)
    assert_same(counts, counts_1, 0)
