"""A whole training step, compiled for four H100: experts and attention are the fast ones."""

import math
import re

import pytest

from dynmoe_jax import config
from dynmoe_jax.planning.compile import compile_step
from dynmoe_jax.training.mesh import make_mesh

# The paper's model, p = 0.4 of 16 experts, with everything else small.
B, L, D, F, E, K, V = 8, 512, 256, 512, 16, 7, 4096
MODEL = config.Model(
    num_layers=2,
    width=D,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=V,
    max_seq_len=L,
    moe=config.MoE(num_experts=E, hidden_width=F, router="top_p", top_p=0.4),
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
    # Of one device: its tokens, with all K experts, of which it has a quarter.
    rows = K * B * L // 4
    kernels = {
        found[0]
        for p in module.products()
        if p.kind == "kernel" and (found := re.search(r"grouped_[a-z_]+", p.op_name))
    }
    assert kernels == {
        *("grouped_swiglu", "grouped_hidden_gradient"),
        *("grouped_product", "grouped_weight_gradient"),
    }
    assert max(p.flops for p in module.products()) <= 2 * 2 * rows * D * 2 * F


def test_tokens_travel_to_their_experts_alone(module):
    opcodes = [i.opcode for _, _, i in module.instructions()]
    # Forward there and back, and the same backward.
    assert opcodes.count("ragged-all-to-all-start") >= 4


def test_attention_never_holds_all_scores(module):
    text = " ".join(i.text for _, _, i in module.instructions())
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text
    shapes = {shape for _, _, i in module.instructions() for shape in i.shapes}
    # Heads times pairs of positions.
    assert not [s for s in shapes if s.count(L) >= 2 and math.prod(s) >= 4 * L * L]
