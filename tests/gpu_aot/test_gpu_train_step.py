"""A whole training step, compiled for four H100: experts and attention are the fast ones."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dynmoe_jax import config
from dynmoe_jax.mesh.make_mesh import make_mesh
from dynmoe_jax.model.kernels.attention.triton import triton_attention
from dynmoe_jax.planning.compile import compile_step

pytestmark = pytest.mark.slow

# The paper's experts, two for each token, with everything else small.
B, L, D, F, E, K, V = 8, 640, 256, 512, 16, 2, 4096
MODEL = config.Model(
    num_layers=2,
    width=D,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=V,
    max_seq_len=L,
    moe=config.MoE(num_experts=E, hidden_width=F, router="top_k", top_k={"k": K}),
)


@pytest.fixture(scope="module")
def module(mesh_of):
    cfg = config.Config(
        model=MODEL,
        data=config.Data(seq_len=L),
        loss=config.Loss(chunk_tokens=128),
        train=config.Train(batch_size=B),
        mesh=config.Mesh(data=1, expert=4),
    )
    mesh = make_mesh(cfg.mesh, B, list(mesh_of("h100", 4).devices.flat))
    return compile_step(cfg, mesh).module


def test_nothing_is_dense_over_experts(module):
    # Of one device, if all tokens chose its experts.
    rows = K * B * L
    kernels = {
        found[0]
        for p in module.products()
        if p.kind == "kernel" and (found := re.search(r"grouped_[a-z_]+", p.op_name))
    }
    assert kernels == {
        *("grouped_swiglu", "grouped_hidden_gradient"),
        *("grouped_product", "grouped_weight_gradient"),
    }
    assert max(p.flops for p in module.products()) <= 2 * rows * D * 2 * F


def test_tokens_travel_to_their_experts_alone(module):
    opcodes = [i.opcode for _, _, i in module.instructions()]
    # Forward there and back, and the same backward.
    assert opcodes.count("ragged-all-to-all-start") >= 4


def test_attention_never_holds_all_scores(module):
    names = " ".join(i.op_name for _, _, i in module.instructions() if i.is_kernel)
    for name in ("attention_forward", "attention_to_keys", "attention_to_queries"):
        assert name in names
    shapes = {shape for _, _, i in module.instructions() for shape in i.shapes}
    # Pairs of positions, of any number of heads.
    assert not [s for s in shapes if s.count(L) >= 2]


@pytest.mark.parametrize(("chip", "width"), [("h100", 128), ("a100", 128), ("rtx4090", 64)])
def test_attention_fits(mesh_of, chip, width):
    mesh = mesh_of(chip)
    sharding = NamedSharding(mesh, P())

    def array(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def gradients(query, key, value, segment_ids, dmixed):
        attend = partial(triton_attention, segment_ids_BL=segment_ids)
        return jax.vjp(attend, query, key, value)[1](dmixed)

    query, key = array((2, L, 4, width)), array((2, L, 2, width))
    with jax.set_mesh(mesh):  # says for which GPU to trace
        run = jax.jit(gradients).lower(query, key, key, array((2, L), jnp.int32), query)
    assert run.compile().as_text().count("custom_call_target=") == 3
