"""Plans of GPUs, the search over meshes, and the command, on a model of a few parameters."""

import dataclasses
import json

import pytest

from dynmoe_jax import config
from dynmoe_jax.config import ConfigError
from dynmoe_jax.model.flops import training_flops
from dynmoe_jax.planning import __main__ as command
from dynmoe_jax.planning.gpu import devices
from dynmoe_jax.planning.memory import MemoryPlan
from dynmoe_jax.planning.plan import expected_experts
from dynmoe_jax.planning.planner import Request, plan_run, search_meshes, with_mesh
from dynmoe_jax.planning.report import print_plan
from dynmoe_jax.planning.search import Search
from dynmoe_jax.planning.search_report import print_search

B, L, D, F, E, V = 16, 128, 64, 96, 4, 512
CONFIG = config.Config(
    model=config.Model(
        num_layers=2,
        width=D,
        num_heads=4,
        num_kv_heads=4,
        head_width=16,
        hidden_width=F,
        vocab_size=V,
        moe=config.MoE(num_experts=E, hidden_width=F, router="top_k", top_k={"k": 2}),
    ),
    data=config.Data(seq_len=L),
    train=config.Train(batch_size=B, steps=3600),
)


def change(**groups):
    found = {
        name: dataclasses.replace(getattr(CONFIG, name), **values)
        for name, values in groups.items()
    }
    return dataclasses.replace(CONFIG, **found)


def test_a_gpu_plan_by_hand():
    plan = plan_run(Request(CONFIG, "h100:1"))
    flops = training_flops(CONFIG.model, B * L, L, 2 * B * L * 2)
    assert plan.flops.analytic == flops
    assert plan.flops.ratio is None
    # Attention: 4 D^2 and L/2 pairs of 2 x 2 D per token; the head once; all at 989 TFLOP/s.
    layers = 3 * 2 * B * L * (2 * D * 4 * D + 2 * L * D) / 989e12
    logits = 3 * B * L * 2 * D * V / 989e12
    # Experts are bound by their bytes: weights three times, rows five times, in bfloat16.
    rows = 2 * B * L
    experts = 2 * 2 * (3 * 3 * E * D * F + 5 * rows * D) / 3.35e12
    by_name = {operation.what: operation.total for operation in plan.operations}
    assert by_name["projections"] + by_name["scores"] == pytest.approx(layers)
    assert by_name["logits"] == pytest.approx(logits)
    assert by_name["experts"] == pytest.approx(experts)
    # One device: nothing travels.
    assert plan.traffic == ()
    assert plan.time.step == pytest.approx(sum(by_name.values()))
    assert plan.days == pytest.approx(3600 * plan.time.step / 86400)
    assert plan.chip_hours == pytest.approx(plan.time.step)
    assert plan.tokens_per_second == pytest.approx(B * L / plan.time.step)
    assert plan.utilisation == pytest.approx(flops / plan.time.step / 989e12)


def test_recomputing_layers_costs_a_forward_pass_and_no_utilisation():
    plan = plan_run(Request(CONFIG, "h100:1"))
    again = plan_run(Request(change(model={"remat": "layer"}), "h100:1"))
    assert again.flops.recomputed == pytest.approx(again.flops.analytic / 3)
    assert again.time.compute > 1.1 * plan.time.compute
    assert again.memory.activations < plan.memory.activations


def test_state_is_shared_and_parameters_travel():
    one = plan_run(Request(CONFIG, "h100:1"))
    eight = plan_run(Request(CONFIG, "h100:8"))
    # Norms and the router are small; everything else is cut in eight.
    assert one.memory.parameters / 8 <= eight.memory.parameters <= one.memory.parameters / 7
    assert {traffic.axes for traffic in eight.traffic} == {"data"}
    assert {t.kind for t in eight.traffic} == {"all-gather", "reduce-scatter"}
    by_network = plan_run(Request(CONFIG, "h100:4x2"))
    # The same bytes, over a network that is nine times slower.
    assert by_network.time.collectives > 2 * eight.time.collectives


def test_experts_travel_to_tokens_or_tokens_to_experts():
    plan = plan_run(Request(change(mesh={"expert": 4}), "h100:8"))
    assert plan.mesh == {"slice": 1, "data": 2, "expert": 4, "model": 1}
    (gathers,) = (t for t in plan.traffic if (t.axes, t.kind) == ("expert", "all-gather"))
    # Forward and backward of two layers: the tokens of four devices, in bfloat16, less its own.
    assert gathers.runs == 4
    assert gathers.bytes == 4 * 3 * (B * L // 8) * D * 2


def test_experts_per_token():
    assert expected_experts(config.MoE(router="top_k", top_k={"k": 3}), None) == 3
    # What the Top-P paper reports.
    assert expected_experts(config.MoE(router="top_p"), None) == 1.76
    assert expected_experts(config.MoE(router="top_p", num_experts=1), None) == 1
    assert expected_experts(config.MoE(every_n_layers=0), None) == 0
    assert expected_experts(config.MoE(), 2.5) == 2.5
    with pytest.raises(ConfigError, match=r"--experts_per_token=17 must be .* at most"):
        expected_experts(config.MoE(), 17)


def test_more_experts_per_token_cost_more():
    some = plan_run(Request(CONFIG, "h100:1", 1.0))
    more = plan_run(Request(CONFIG, "h100:1", 3.0))
    rows = 3 * 2 * 6 * D * F * B * L
    assert more.flops.analytic - some.flops.analytic == pytest.approx(2 * rows)


def test_microbatches_are_no_more_than_leave_each_device_a_sequence():
    sizes = {"slice": 1, "data": 8, "expert": 1, "model": 1}
    assert with_mesh(change(train={"microbatches": 16}), sizes).train.microbatches == 2
    assert with_mesh(change(train={"microbatches": 1}), sizes).train.microbatches == 1
    plan = plan_run(Request(change(train={"microbatches": 16}), "h100:8"))
    assert "--config.train.microbatches=2" in plan.assumptions[0]


def test_a_run_that_does_not_fit_says_what_would():
    wide = change(model={"width": 8192, "vocab_size": 2**20, "num_heads": 128, "head_width": 64})
    plan = plan_run(Request(wide, "a100:1"))
    assert not plan.memory.fits
    # 2 x 2^20 x 8192 parameters, twelve bytes each and four of gradients.
    assert "as many devices along config.mesh.data" in plan.memory.remedy
    long = change(train={"batch_size": 2**18})
    plan = plan_run(Request(long, "a100:1"))
    assert "config.train.microbatches" in plan.memory.remedy


def test_memory_adds_up():
    memory = MemoryPlan(1, 2, 3, 4, 5, limit=15)
    assert (memory.total, memory.fits) == (15, True)
    assert not dataclasses.replace(memory, limit=14).fits


def test_a_search_ranks_what_obeys_the_rules():
    found = search_meshes(Request(CONFIG, "h100:8"))
    assert found.too_large == ()
    steps = [plan.time.step for plan in found.ranked]
    assert steps == sorted(steps)
    tried = {tuple(plan.mesh.values()) for plan in found.ranked}
    # 8 = data x expert x model, at most 4 experts and 4 heads.
    assert tried == {
        (1, *mesh)
        for mesh in (
            *[(8, 1, 1), (4, 2, 1), (2, 4, 1)],
            *[(4, 1, 2), (2, 2, 2), (1, 4, 2)],
            *[(2, 1, 4), (1, 2, 4)],
        )
    }
    assert "config.mesh.expert=8 must divide" in found.refused["expert 8"]
    assert "config.mesh.model=8 must divide" in found.refused["model 8"]


def test_a_search_without_any_mesh_says_why():
    with pytest.raises(ConfigError, match=r"No mesh of h100:3 .* must be a multiple of the 3"):
        search_meshes(Request(CONFIG, "h100:3"))


def test_reports_show_every_figure(capsys):
    cfg = change(mesh={"expert": 4}, train={"microbatches": 2})
    print_plan(plan_run(Request(cfg, "h100:8")))
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "mesh data 2 x expert 4",
        "Utilisation",
        "tokens/s",
        "days",
        "chip-hours",
        "parameters",
        "optimizer",
        "activations kept for backward",
        "temporaries",
        "analytic: the model",
        "collectives that nothing hides",
        "all-gather",
        "experts.parallel.shard:",
        "in 2 microbatches",
    ):
        assert part in text


def test_the_ranking_names_the_flags_of_the_best(capsys):
    search = search_meshes(Request(CONFIG, "h100:8"))
    print_search(search)
    text = " ".join(capsys.readouterr().out.split())
    best = search.ranked[0].mesh
    assert f"--config.mesh.data={best['data']} --config.mesh.expert={best['expert']}" in text
    assert "Not tried: expert 8" in text


def test_what_does_not_fit_ranks_nowhere():
    plan = plan_run(Request(CONFIG, "h100:1"))
    large = dataclasses.replace(plan, memory=MemoryPlan(9, 0, 0, 0, 0, limit=1, remedy="wait"))
    found = Search.of("h100:1", [large, plan], {})
    assert (found.ranked, found.too_large) == ((plan,), (large,))


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(
        "import dataclasses\nfrom dynmoe_jax import config\n\n\ndef get_config():\n"
        f"    return config.to_config_dict(config.from_config_dict({config.to_dict(CONFIG)!r}))\n"
    )
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["planning", *map(str, arguments)])
    return command.command_line.exit_code(command.main)


def test_the_command_prints_and_writes(config_file, tmp_path, monkeypatch, capsys):
    path = tmp_path / "plan.json"
    flags = [f"--config={config_file}", "--topology=h100:8", f"--json={path}"]
    assert run(monkeypatch, *flags, "--config.mesh.expert=2", "--experts_per_token=1.5") == 0
    figures = json.loads(path.read_text())
    assert figures["mesh"]["expert"] == 2
    assert figures["experts_per_token"] == 1.5
    assert figures["memory"]["fits"]
    assert figures["time"]["step"] > 0
    assert "Figures written to" in capsys.readouterr().out


def test_the_command_searches(config_file, tmp_path, monkeypatch):
    path = tmp_path / "search.json"
    flags = [f"--config={config_file}", "--topology=h100:4", f"--json={path}", "--search"]
    assert run(monkeypatch, *flags) == 0
    assert len(json.loads(path.read_text())["ranked"]) > 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--topology is missing"),
        (["--topology=h100"], "not the name of a topology"),
        (["--topology=h100:8", "--config.mesh.model=3"], "config.mesh asks for"),
        (["--topology=h100:8", "--experts_per_token=many"], "experts_per_token"),
        (["--topology=h100:8", "--topologi=x"], "--topologi is not a flag"),
        (["--topology=h100:8", "--config.model.widht=3"], "did you mean config.model.width"),
        (["--topology=h100:8", "--json=/no/such/folder/x.json"], "cannot be written"),
    ],
)
def test_mistakes_are_one_sentence(config_file, monkeypatch, capsys, arguments, says):
    assert run(monkeypatch, f"--config={config_file}", *arguments) == 2
    text = " ".join(capsys.readouterr().out.split())
    assert says in text
    assert "error:" in text


def test_without_the_compiler_for_gpus_it_is_named(config_file, monkeypatch, capsys):
    monkeypatch.setattr(devices, "PLUGIN", "no-such-package")
    assert run(monkeypatch, f"--config={config_file}", "--topology=h100:8", "--compile") == 2
    text = " ".join(capsys.readouterr().out.split())
    assert "--compile: no-such-package is not installed: pip install -e '.[gpu-aot]'" in text


def test_a_run_that_does_not_fit_has_its_own_exit_code(config_file, monkeypatch):
    flags = ["--config.train.batch_size=262144", "--topology=a100:1"]
    assert run(monkeypatch, f"--config={config_file}", *flags) == command.EXIT_DOES_NOT_FIT


def test_help(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert "--topology=NAME" in text
    assert "model.num_layers" in text
