"""The expert layer and its gradient, compiled for GPUs: FLOPs, and nothing dense over experts."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dynmoe_jax import config
from dynmoe_jax.experts import ExpertWeights, apply_experts, make_backend
from dynmoe_jax.hardware.target import Target
from dynmoe_jax.planning.hlo.module import Module
from dynmoe_jax.routing import TopK, TopP

# The paper's shape: 16 experts, p = 0.4, so at most K = 7 experts per token.
T, D, F, E, K = 8192, 1024, 2816, 16, 7
PAPER = TopP(0.4)


def compile_layer(mesh, tokens, router=PAPER, products="auto"):
    """Router, rows, experts, and the gradients of all of them."""
    moe = config.MoE(grouped_product=products)
    backend = make_backend(moe, Target.of(mesh.devices.flat[0]))

    def array(shape, dtype, spec=()):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def loss(x_TD, logits_TE, weights):
        routing = router.on_logits(logits_TE, jnp.ones(tokens, bool))
        y_TD, _ = apply_experts(x_TD, routing, weights, backend)
        return jnp.sum(jnp.square(y_TD.astype(jnp.float32)))

    weights = ExpertWeights(array((E, D, 2 * F), jnp.bfloat16), array((E, F, D), jnp.bfloat16))
    x_TD = array((tokens, D), jnp.bfloat16, ("data",))
    logits_TE = array((tokens, E), jnp.float32, ("data",))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        return Module(gradient.lower(x_TD, logits_TE, weights).compile().as_text())


def kernels(module):
    found = [p for p in module.products() if p.kind == "kernel"]
    return sorted(re.search(r"grouped_[a-z_]+", p.op_name)[0] for p in found)


ONE_PART = [
    "grouped_hidden_gradient",
    *["grouped_product"] * 2,
    "grouped_swiglu",
    *["grouped_weight_gradient"] * 2,
]


def test_layer_and_gradient(mesh_of):
    module = compile_layer(mesh_of("h100"), T)
    # Forward 6, backward 12 FLOPs per row and D F.  Rows beyond the first S are computed in chunks
    # of n rows by a loop whose length is data, whose body is counted once, and which computes gate
    # and up again.
    S, n = 2 * T, T // 2
    assert module.flops() == pytest.approx((18 * S + 22 * n) * D * F, rel=0.1)
    assert kernels(module) == sorted([*ONE_PART * 2, "grouped_product"])
    assert dense_or_copied(module) == []


def test_the_check_finds_what_xla_makes_dense(mesh_of):
    assert dense_or_copied(compile_layer(mesh_of("h100"), T, TopK(2), "xla"))


def test_each_gpu_of_a_mesh_computes_its_own_tokens(mesh_of):
    module = compile_layer(mesh_of("h100", 4), 4 * T, TopK(2))
    assert kernels(module) == ONE_PART
    assert module.flops() == pytest.approx(18 * 2 * T * D * F, rel=0.1)


# On an A100 and an RTX 4090 there is less shared memory, and warps multiply one by one.
@pytest.mark.parametrize("chip", ["a100", "rtx4090"])
def test_kernels_fit(mesh_of, chip):
    assert kernels(compile_layer(mesh_of(chip), T, TopK(2))) == ONE_PART


def dense_or_copied(module):
    """What is larger than all rows or all weights, and weights that are turned or copied."""
    largest = max(2 * T * 2 * F, E * D * 2 * F)
    weights = {E * D * 2 * F, E * F * D}

    def wrong(instruction):
        sizes = [math.prod(shape) for shape in instruction.shapes]
        moved = instruction.opcode in ("copy", "transpose") and not weights.isdisjoint(sizes)
        return moved or max(sizes) > 1.1 * largest

    return [i.name for _, _, i in module.instructions() if wrong(i)]
