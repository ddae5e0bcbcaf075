"""The expert layer and its gradient, compiled for TPUs: FLOPs, and nothing dense over experts."""

import math

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

pytestmark = pytest.mark.slow

# The paper's shape: 16 experts, p = 0.4, so at most K = 7 experts per token.  More tokens would get
# tiles of the same rows, and take longer to compile.
T, D, F, E, K = 2048, 1024, 2816, 16, 7
R, S = K * T, 2 * T


def arguments(mesh, tokens, D=D, F=F, E=E):
    def array(shape, dtype, spec=()):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    weights = ExpertWeights(array((E, D, 2 * F), jnp.bfloat16), array((E, F, D), jnp.bfloat16))
    x_TD = array((tokens, D), jnp.bfloat16, ("data",))
    return x_TD, array((tokens, E), jnp.float32, ("data",)), weights


PAPER = TopP(0.4)


def compile_layer(mesh, tokens, D=D, F=F, E=E, router=PAPER):
    """Router, rows, experts, and the gradients of all of them."""
    backend = make_backend(config.MoE(), Target.of(mesh.devices.flat[0]))

    def loss(x_TD, logits_TE, weights):
        routing = router.on_logits(logits_TE, jnp.ones(tokens, bool))
        y_TD, _ = apply_experts(x_TD, routing, weights, backend)
        return jnp.sum(jnp.square(y_TD.astype(jnp.float32)))

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        return Module(gradient.lower(*arguments(mesh, tokens, D, F, E)).compile().as_text())


def dense_over_experts(module, rows, D=D, F=F):
    """What costs or holds more than anything that is grouped by expert needs."""
    largest_product = 2 * rows * D * 2 * F
    largest_array = max(rows * 2 * F, E * D * 2 * F)
    found = [p.name for p in module.products() if p.flops > 1.1 * largest_product]
    return found + [
        i.name
        for _, _, i in module.instructions()
        if any(math.prod(shape) > 1.1 * largest_array for shape in i.shapes)
    ]


# The paper's layer on one chip; on four, a small one, which takes a third of the time.
@pytest.mark.parametrize(
    ("chip", "count", "D", "F"), [("v5p", 1, D, F), ("v6e", 4, 256, 512)], ids=["v5p-1", "v6e-4"]
)
def test_layer_and_gradient(mesh_of, chip, count, D, F):
    # T tokens on each chip; the module is what one chip runs.
    module = compile_layer(mesh_of(chip, count), T * count, D, F)
    # Forward 6, backward 12 FLOPs per row and D F, and 4 to compute gate and up again.  Rows beyond
    # the first S are computed in chunks of n rows by a loop whose length is data, and its body is
    # counted once.
    n = S // 4
    assert module.flops() == pytest.approx((18 + 4) * (S + n) * D * F, rel=0.1)
    assert dense_over_experts(module, R, D, F) == []
    kernels = [p for p in module.products() if p.kind == "kernel"]
    # The first part and a chunk, each with gate and up fused forward, these and the gradient of
    # what is hidden fused backward, and down, its weights, gate_up's, and the inputs by themselves.
    assert len(kernels) == 2 * 6
    # Gate and up of all rows never exist forward: the largest array of rows is [S, 2F] backward.
    fused = [p for p in kernels if "grouped_swiglu" in p.name]
    assert sorted(p.flops / D / F for p in fused) == [4 * n, 6 * n, 4 * S, 6 * S]
    # Rows are matched with tokens by counting, and moved by gathers: nothing larger than the
    # router's top k is sorted (57344 rows took 5 to 12 s of compilation).
    sorted_shapes = [s for _, _, i in module.instructions() if i.opcode == "sort" for s in i.shapes]
    assert max((math.prod(shape) for shape in sorted_shapes), default=0) <= T * E


# Mixtral's experts, and many small ones: what a kernel holds fits into each chip's fast memory.
# Two experts per token are S rows: no chunks, whose kernels would be compiled once more.
@pytest.mark.parametrize(
    ("chip", "shape"),
    [
        ("v4", (4096, 14336, 8)),
        pytest.param("v4", (2048, 1024, 64), marks=pytest.mark.long),
        pytest.param("v5e", (4096, 14336, 8), marks=pytest.mark.long),
        pytest.param("v6e", (1024, 2816, 16), marks=pytest.mark.long),
    ],
)
def test_kernels_fit_into_fast_memory(mesh_of, chip, shape):
    module = compile_layer(mesh_of(chip), T, *shape, router=TopK(2))
    kernels = {i.name for _, _, i in module.instructions() if i.is_kernel}
    for name in ("grouped_swiglu_gradient", "sum_of_rows", "tgmm"):
        assert any(name in kernel for kernel in kernels), kernels


def test_the_check_finds_the_dense_weight_gradient_of_masked_rows(mesh_of):
    # What XLA made of ragged_dot's weight gradient until jax 0.12 brought a kernel.
    mesh = mesh_of("v5p")

    def weight_gradient(x_RD, dy_RG, expert_R):
        of_expert_ER = jnp.arange(E)[:, None] == expert_R
        x_ERD = jnp.where(of_expert_ER[..., None], x_RD, 0)
        return jnp.einsum("erd,rg->edg", x_ERD, dy_RG)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    shapes = array(R, D), array(R, 2 * F), array(R, dtype=jnp.int32)
    compiled = jax.jit(weight_gradient).lower(*shapes).compile()
    module = Module(compiled.as_text())
    (dense,) = [p for p in module.products() if p.name in dense_over_experts(module, R)]
    assert dense.kind == "convolution"
    assert dense.flops == E * 2 * R * D * 2 * F
