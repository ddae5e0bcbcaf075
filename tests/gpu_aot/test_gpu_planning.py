"""A plan of a small model on GPUs, from the compiled step to the printed report."""

import pytest

from dynmoe_jax import config
from dynmoe_jax.model.parameters import count_parameters
from dynmoe_jax.planning.planner import Request, plan_run
from dynmoe_jax.planning.report import print_plan

pytestmark = pytest.mark.slow

B, L, D, F, E, V = 8, 1024, 512, 512, 4, 4096
CONFIG = config.Config(
    model=config.Model(
        num_layers=3,
        width=D,
        num_heads=8,
        num_kv_heads=8,
        vocab_size=V,
        max_seq_len=L,
        moe=config.MoE(num_experts=E, hidden_width=F, router="top_k", top_k={"k": 2}),
    ),
    data=config.Data(seq_len=L),
    loss=config.Loss(chunk_tokens=1024),
    train=config.Train(batch_size=B),
    mesh=config.Mesh(data=2),
)


@pytest.fixture(scope="module")
def plan(mesh_of):
    mesh_of("h100")  # skips where nothing can be compiled for a GPU
    return plan_run(Request(CONFIG, "h100:2", compile=True))


def test_memory_is_the_compiler_s(plan):
    share = 4 * count_parameters(CONFIG.model) / 2
    assert plan.memory.fits
    assert plan.memory.parameters == pytest.approx(share, rel=0.05)
    assert plan.memory.activations > 0
    assert plan.memory.temporaries > 0


def test_flops_are_those_of_the_model(plan):
    assert plan.flops.ratio == pytest.approx(1, rel=0.05)
    # Scores twice more, which attention does not keep.
    assert 0 < plan.flops.recomputed < 0.2 * plan.flops.analytic
    assert plan.flops.dense_over_experts == ()


def test_time_is_that_of_operations_and_of_arithmetic(plan):
    by_arithmetic = plan_run(Request(CONFIG, "h100:2"))
    assert by_arithmetic.compile_seconds == 0
    assert plan.time.collectives == by_arithmetic.time.collectives > 0
    # What XLA adds between the products.
    assert plan.time.compute > by_arithmetic.time.compute
    assert 0 < plan.time.kernels < plan.time.compute
    assert 0 < plan.utilisation < by_arithmetic.utilisation


def test_the_report(plan, capsys):
    print_plan(plan)
    text = " ".join(capsys.readouterr().out.split())
    for part in ("h100:2, mesh data 2", "grouped_swiglu", "of the compiled step", "Compiled in"):
        assert part in text
