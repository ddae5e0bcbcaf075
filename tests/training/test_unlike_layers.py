"""Training of layers that differ: on a mesh, and a whole run from first step to generation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.command_line import EXIT_INTERRUPTED
from dynmoe_jax.evaluation.report.page import write_report
from dynmoe_jax.inference.generate import Generator
from dynmoe_jax.inference.sampling import Sampling
from dynmoe_jax.interop import CheckpointError
from dynmoe_jax.interop.architectures.registry import architecture_for
from dynmoe_jax.mesh.make_mesh import (
    batch_sharding,
    check_divides,
    make_mesh,
    state_shardings,
)
from dynmoe_jax.model.decoder import variable_shapes
from dynmoe_jax.model.flops import training_flops
from dynmoe_jax.model.parameters import active_parameters
from dynmoe_jax.planning.planner import Request, plan_run
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.runs.summary import read_summary
from dynmoe_jax.training import trainer
from dynmoe_jax.training.health.collapse import CollapseWatch
from dynmoe_jax.training.health.memory import Need, advice
from dynmoe_jax.training.health.nan_report import check_state
from dynmoe_jax.training.log.metric_logger import StepRecorder
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import first_state, init_state, make_train_step
from tests.small_run import interrupt_at

pytestmark = pytest.mark.slow

LAYERS = (
    "1:feed_forward=dense,hidden_width=20;"
    "2:moe.num_experts=6,moe.hidden_width=24,num_kv_heads=2,head_width=4"
)
EXPERTS = (4, 6)


@pytest.fixture(scope="module")
def cfg(settings, change):
    return change(settings, model__num_layers=3, model__layers=LAYERS, train__steps=3)


@pytest.fixture(scope="module")
def whole(cfg, traced_once, tmp_path_factory):
    """A run of three steps that was stopped after two, and went on from its checkpoint."""
    workdir = tmp_path_factory.mktemp("runs") / "unlike"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 2)
        assert trainer.train(cfg, workdir) == EXIT_INTERRUPTED
    assert trainer.train(cfg, workdir) == 0
    return workdir


def test_metrics_count_the_experts_that_exist(cfg, whole):
    lines = read_metrics(whole)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(len(line["experts_per_token_by_layer"]) == 2 for line in lines)
    assert all(line["load_imbalance_by_layer"][0] <= 4 for line in lines)
    assert all(line["unused_experts"] <= sum(EXPERTS) for line in lines)


def test_report_and_summary_show_the_experts_that_exist(cfg, whole):
    summary = read_summary(whole)
    assert summary.complete
    assert tuple(map(len, summary.heldout.load_by_layer)) == EXPERTS
    wanted = active_parameters(cfg.model, summary.heldout.experts_per_token_by_layer)
    assert summary.active_parameters == wanted
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "4 to 6 experts per MoE layer" in page


def test_report_counts_unused_experts_among_those_that_exist(cfg, whole, tmp_path):
    summary = read_summary(whole)
    loads = [[0.5, 0.0, 0.5, 0.5], [0.5] * 6]
    heldout = dataclasses.replace(summary.heldout, load_by_layer=loads)
    summary = dataclasses.replace(summary, heldout=heldout)
    path = write_report(tmp_path, cfg, read_metrics(whole), summary)
    assert "Never chosen (×): 1 of 10 experts." in path.read_text(encoding="utf-8")


def test_generation_from_the_run(whole):
    loaded, decoder, tokenizer = load_run(whole)
    assert loaded.model.layers == LAYERS
    prompts, sampling = [[1, 2, 3], [4]], Sampling(temperature=0.0)
    written = Generator(decoder).write(
        prompts, [3, 3], sampling, vocab_size=tokenizer.vocab_size, stop_ids=[]
    )
    assert [len(continuation.ids) for continuation in written] == [3, 3]
    assert written[0].experts_nN.shape == (3, 2)
    assert np.all(written[0].experts_nN >= 1)


def test_export_and_plans_are_refused_in_a_sentence(cfg):
    with pytest.raises(CheckpointError, match=r"differ by config.model.layers='1:feed"):
        architecture_for(cfg.model)
    with pytest.raises(config.ConfigError, match=r"config.model.layers='1:f.* the planner knows"):
        plan_run(Request(cfg, "v5p:2x2x1"))


def test_one_step_on_a_mesh_is_that_of_one_device(cfg, change):
    """Experts, heads and hidden units of every layer are cut in two, and the batch."""
    cfg = change(cfg, model__vocab_size=32, model__num_kv_heads=2, data__seq_len=8)
    schedule = make_schedule(cfg.optimizer, 10)
    optimizer = make_optimizer(cfg.optimizer, schedule)
    step = make_train_step(cfg, optimizer, schedule)
    random = np.random.default_rng(0)
    tokens, targets = random.integers(0, 32, (2, 8, 8)).astype(np.int32)
    segments = (np.arange(8) < random.integers(1, 9, (8, 1))).astype(np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), (8, 8))
    batch = {"tokens": tokens, "targets": targets}
    batch |= {"segment_ids": segments, "positions": positions}
    draw = lambda x: jnp.asarray(random.normal(scale=0.3, size=x.shape), x.dtype)  # noqa: E731
    start = first_state(cfg, optimizer, jax.tree.map(draw, variable_shapes(cfg.model)))
    wanted, wanted_metrics = jax.jit(step)(start, batch)
    mesh = make_mesh(config.Mesh(data=2, expert=2, model=2), 8)
    check_divides(cfg.model, mesh.shape)
    with jax.set_mesh(mesh):
        placed = state_shardings(start, mesh)
        run = jax.jit(step, out_shardings=(placed, None))
        found, metrics = run(
            jax.device_put(start, placed), jax.device_put(batch, batch_sharding(mesh))
        )
    np.testing.assert_array_equal(metrics["load_NE"], wanted_metrics["load_NE"])
    np.testing.assert_allclose(metrics["loss"], wanted_metrics["loss"], rtol=1e-5)
    before = jax.tree.leaves_with_path(start.params)
    for (path, old), a, w in zip(
        before, jax.tree.leaves(found.params), jax.tree.leaves(wanted.params), strict=True
    ):
        moved = np.linalg.norm(np.asarray(w) - np.asarray(old))
        assert np.linalg.norm(np.asarray(a) - np.asarray(w)) <= 1e-3 * moved + 1e-7, path


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ({"expert": 4}, "config.mesh.expert=4 must divide config.model.moe.num_experts=6 of layer"),
        ({"model": 2}, "config.mesh.model=2 must divide config.model.num_kv_heads=1 of layer 0"),
    ],
)
def test_every_layer_must_fit_the_mesh(cfg, mesh, words):
    with pytest.raises(config.ConfigError, match=words):
        check_divides(cfg.model, {"expert": 1, "model": 1} | mesh)


def test_recorder_counts_each_layer_at_its_own_width(cfg):
    recorder = StepRecorder(cfg, 0)
    load_NE = np.array([[4, 4, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    scalars = "loss lm_loss balance_loss entropy_loss router_z_loss grad_norm learning_rate"
    metrics = dict.fromkeys(scalars.split(), np.float32(1))
    metrics |= dict.fromkeys(("skipped_updates", "skipped_in_a_row", "spike_steps"), 0)
    metrics |= {"load_NE": load_NE, "dropped_N": np.array([2, 1])}
    line = recorder.record(1, metrics | {"tokens": 10})
    assert line["unused_experts"] == 2 + 1
    assert line["load_imbalance_by_layer"] == pytest.approx([2, 6 / 5])
    flops = training_flops(cfg.model, 8 * 32, 32, [6, 4])
    assert line["model_flops_per_second"] * line["seconds_step"] == pytest.approx(flops)


def test_warnings_name_only_experts_that_exist(cfg, change):
    watch = CollapseWatch(change(cfg, train__collapse_steps=1), 0)
    load_NE = np.array([[4, 4, 0, 4, 0, 0], [4, 4, 4, 4, 4, 4]])
    warnings = [text for step in (1, 2) for text in watch.look(step, load_NE, 8)]
    unused = [text for text in warnings if "no token has chosen" in text]
    assert len(unused) == 1
    assert "no token has chosen expert 2 of MoE layer 0 for" in unused[0]
    assert "config.model.layers" in unused[0]


def test_reports_of_states_number_the_layers(cfg):
    optimizer = make_optimizer(cfg.optimizer, make_schedule(cfg.optimizer, 1))
    shapes = jax.eval_shape(lambda: init_state(cfg, optimizer, jax.random.key(0)))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    names = [checked.name for checked in check_state(state, cfg.model)]
    routers = [
        n for n in names if n.startswith("layer") and n.endswith("parameter feed_forward router_DE")
    ]
    assert [int(name[6]) for name in sorted(routers)] == [0, 2]


def test_advice_for_less_memory_names_no_layers_away(cfg):
    words = advice(Need(10**9, 10**8), 10**8, cfg, 1)
    assert "num_layers" not in words
