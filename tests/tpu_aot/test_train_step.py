"""A whole training step, compiled for a TPU: experts, attention and loss are the fast ones."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dynmoe_jax import config
from dynmoe_jax.data import BATCH_ARRAYS
from dynmoe_jax.hardware.target import Target, compile_for
from dynmoe_jax.planning.hlo.module import Module
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import init_state, make_train_step

pytestmark = pytest.mark.slow

# The paper's model, p = 0.4 of 16 experts, with everything else small.
B, L, D, F, E, K, V, CHUNK = 2, 512, 256, 512, 16, 7, 3968, 128
MODEL = config.Model(
    num_layers=2,
    width=D,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=V,
    max_seq_len=L,
    moe=config.MoE(num_experts=E, hidden_width=F, router="top_p", top_p={"threshold": 0.4}),
)
CONFIG = config.Config(
    model=MODEL,
    data=config.Data(seq_len=L),
    loss=config.Loss(chunk_tokens=CHUNK),
    train=config.Train(batch_size=B),
)


@pytest.fixture(scope="module")
def module(mesh_of):
    mesh = mesh_of("v5p")
    everywhere = NamedSharding(mesh, P())
    schedule = make_schedule(CONFIG.optimizer, CONFIG.train.steps)
    optimizer = make_optimizer(CONFIG.optimizer, schedule)

    def shaped(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    with compile_for(Target.of(mesh.devices.flat[0])), jax.set_mesh(mesh):
        state = jax.eval_shape(lambda: init_state(CONFIG, optimizer, jax.random.key(0)))
        batch = {
            name: jax.ShapeDtypeStruct((B, L), jnp.int32, sharding=everywhere)
            for name in BATCH_ARRAYS
        }
        step = jax.jit(make_train_step(CONFIG, optimizer, schedule), donate_argnums=0)
        compiled = step.lower(jax.tree.map(shaped, state), batch).compile()
    return Module(compiled.as_text())


def test_nothing_is_dense_over_experts(module):
    rows = K * B * L
    assert {p.kind for p in module.products()} == {"convolution", "kernel"}
    # The largest product there may be: gate and up of all rows.
    assert max(p.flops for p in module.products()) <= 2 * rows * D * 2 * F
    largest = max(math.prod(shape) for _, _, i in module.instructions() for shape in i.shapes)
    assert largest <= max(rows * 2 * F, 2 * E * D * 2 * F)


def test_gradients_of_logits_exist_for_a_chunk_of_tokens(module):
    found = {
        (math.prod(shape), instruction.text.split("[")[0].strip("("))
        for _, _, instruction in module.instructions()
        for shape in instruction.shapes
        if V in shape and D not in shape and len(shape) > 1
    }
    # Four chunks together; logits in float32 stay in fast memory.
    assert max(found) == (4 * CHUNK * V, "bf16")
    names = [i.name for _, _, i in module.instructions() if i.is_kernel]
    assert any("logit_sums" in name for name in names)


def test_attention_never_holds_all_scores(module):
    names = [f"{i.name} {i.text}" for _, _, i in module.instructions() if i.is_kernel]
    assert any("flat_attention_backward" in name for name in names)
    shapes = {shape for _, _, i in module.instructions() for shape in i.shapes}
    # Heads times pairs of positions.
    assert not [s for s in shapes if s.count(L) >= 2 and math.prod(s) >= 4 * L * L]
