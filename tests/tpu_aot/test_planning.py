"""A plan of a small model on a slice of TPUs, from the compiled step to the printed report."""

import dataclasses

import pytest

from dynmoe_jax import config
from dynmoe_jax.model.parameters import count_parameters
from dynmoe_jax.planning.planner import Request, plan_run
from dynmoe_jax.planning.report import print_plan

pytestmark = pytest.mark.slow

B, L, D, F, E, V = 8, 512, 256, 256, 4, 1024
CONFIG = config.Config(
    model=config.Model(
        num_layers=3,
        width=D,
        num_heads=2,
        num_kv_heads=2,
        head_width=128,
        vocab_size=V,
        max_seq_len=L,
        remat="layer",
        moe=config.MoE(num_experts=E, hidden_width=F, router="top_p", top_p={"threshold": 0.4}),
    ),
    data=config.Data(seq_len=L),
    loss=config.Loss(chunk_tokens=1024),
    train=config.Train(batch_size=B),
    mesh=config.Mesh(data=2, expert=2),
)


@pytest.fixture(scope="module")
def plan(mesh_of):
    mesh_of("v5p")  # skips where nothing can be compiled for a TPU
    return plan_run(Request(CONFIG, "v5p:2x2x1"))


def test_state_is_shared_by_all_devices(plan):
    assert plan.memory.fits
    # Norms and routers are whole on some axes; twelve bytes in all per parameter.
    share = 4 * count_parameters(CONFIG.model) / 4
    assert plan.memory.parameters == pytest.approx(share, rel=0.05)
    assert plan.memory.optimizer == pytest.approx(2 * share, rel=0.05)
    # At the least the stream before each layer, in bfloat16.
    assert plan.memory.activations >= 3 * (B * L // 4) * D * 2
    assert plan.memory.temporaries > 0


def test_loops_are_multiplied_out_and_recomputation_stands_apart(plan):
    # More than MOST_FLOPS, as groups are small: a tile that two experts share counts twice.
    assert 1 <= plan.flops.ratio <= 1.2
    assert plan.flops.dense_over_experts == ()
    # A forward pass: the layers once more, and the logits (by their kernels).
    assert 0.15 < plan.flops.recomputed / plan.flops.analytic < 0.45
    assert plan.flops.rest > 0


def test_what_travels_along_which_axis(plan):
    axes = {axis for traffic in plan.traffic for axis in traffic.axes.split("+")}
    assert axes == {"data", "expert"}
    assert all(traffic.bytes > 0 and traffic.seconds > 0 for traffic in plan.traffic)


def test_time_and_what_follows_from_it(plan):
    assert 0 < plan.time.kernels < plan.time.compute
    assert 0 <= plan.time.exposed <= plan.time.collectives * 1.001
    assert 0 < plan.utilisation < 1
    assert plan.tokens_per_second == pytest.approx(B * L / plan.time.step)
    assert len(plan.operations) == 10
    named = [operation for operation in plan.operations if operation.module]
    assert len(named) >= 8


def test_the_report(plan, capsys):
    print_plan(plan)
    text = " ".join(capsys.readouterr().out.split())
    for part in ("v5p:2x2x1, mesh data 2 x expert 2", "kernel", "optimizer", "Dearest operations"):
        assert part in text


def test_a_step_that_does_not_fit_says_what_would(mesh_of):
    mesh_of("v5p")
    train = dataclasses.replace(CONFIG.train, batch_size=2**14)
    model = dataclasses.replace(CONFIG.model, remat="none")
    large = dataclasses.replace(CONFIG, train=train, model=model)
    plan = plan_run(Request(large, "v5e:2x2"))
    assert not plan.memory.fits
    assert plan.time is None
    assert "config.train.microbatches" in plan.memory.remedy
