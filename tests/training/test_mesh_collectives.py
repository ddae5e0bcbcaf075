"""The compiled step on a mesh: what travels between devices, and what no device holds whole."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from dynmoe_jax import config
from dynmoe_jax.data import BATCH_ARRAYS
from dynmoe_jax.mesh.make_mesh import batch_sharding, make_mesh, state_shardings
from dynmoe_jax.planning.hlo.module import Module
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import StepGradients, init_state

# No two sizes alike, and none a product of others that could stand for it.
N, D, F, E, V, B, L, CHUNK = 4, 24, 40, 8, 112, 8, 32, 16
CONFIG = config.Config(
    model=config.Model(
        num_layers=N,
        width=D,
        num_heads=2,
        num_kv_heads=2,
        head_width=10,
        vocab_size=V,
        max_seq_len=L,
        moe=config.MoE(num_experts=E, hidden_width=F, top_p={"threshold": 0.4}),
    ),
    data=config.Data(seq_len=L),
    loss=config.Loss(chunk_tokens=CHUNK),
    train=config.Train(batch_size=B),
)
LARGEST = E // 2 * D * 2 * F
"""Numbers of the largest parameter of one layer that a device ever holds, of four experts."""


@pytest.fixture(scope="module", params=["none", "elementwise", "layer"])
def module(request):
    model = dataclasses.replace(CONFIG.model, remat=request.param)
    cfg = dataclasses.replace(CONFIG, model=model)
    mesh = make_mesh(config.Mesh(data=2, expert=2, model=2), B, jax.devices()[:8])
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(cfg.optimizer, make_schedule(cfg.optimizer, 10))
        state = jax.eval_shape(lambda: init_state(cfg, optimizer, jax.random.key(0)))
        placed = state_shardings(state, mesh)
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed
        )
        array_BL = jax.ShapeDtypeStruct((B, L), jnp.int32, sharding=batch_sharding(mesh))
        batch = dict.fromkeys(BATCH_ARRAYS, array_BL)
        step = jax.jit(StepGradients(cfg), out_shardings=(placed.params, None))
        return Module(step.lower(state, batch).compile().as_text())


def sizes_of(module, opcode):
    return [
        math.prod(shape)
        for _, _, instruction in module.instructions()
        if instruction.opcode.startswith(opcode)
        for shape in instruction.shapes
    ]


def test_parameters_are_gathered_a_layer_at_a_time(module):
    gathered = sizes_of(module, "all-gather")
    assert LARGEST // 2 in gathered, "the experts of one layer, with their half of F"
    assert max(gathered) <= LARGEST // 2


def test_nothing_holds_all_layers_whole(module):
    # A device keeps an eighth of the stack of gate and up: 2 of D, 2 of E, 2 of F.
    for _, _, instruction in module.instructions():
        for shape in instruction.shapes:
            if shape[:1] == (N,) and len(shape) > 2 and F // 2 in shape:
                assert math.prod(shape) <= N * E * D * 2 * F // 8, instruction.name


def test_gradients_of_experts_are_scattered_not_summed_whole(module):
    # Backward of the gather: each device receives the half of D that it keeps.
    assert max(sizes_of(module, "reduce-scatter"), default=0) >= LARGEST // 2 // 2
    assert max(sizes_of(module, "all-reduce")) < LARGEST // 2


def test_no_device_holds_the_logits_of_its_batch(module):
    # Four parts of the batch, two of the vocabulary, and CHUNK positions at a time.
    shapes = {shape for _, _, i in module.instructions() for shape in i.shapes}
    for shape in shapes:
        if V in shape or V // 2 in shape:
            numbers = math.prod(shape)
            assert numbers <= max(CHUNK * V // 2, D * V // 2), shape
    assert any(V // 2 in shape and D not in shape for shape in shapes)
