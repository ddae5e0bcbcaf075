"""The paper's five models: exact parameter counts by shape evaluation, nothing allocated.

The arithmetic is written out once more here, from the dimensions alone.
"""

import importlib.util
from pathlib import Path

import pytest

from dynmoe_jax import config
from dynmoe_jax.model.parameters import active_parameters, count_parameters
from dynmoe_jax.registry import all_kinds
from dynmoe_jax.routing.losses import coefficients

ROOT = Path(__file__).parent.parent
LAYERS, VOCABULARY, EXPERTS = 24, 32000, 16
NAMES = ["dense_374m", "dense_570m", "moe_top1", "moe_top2", "moe_dynamic"]


@pytest.fixture
def load(monkeypatch):
    """Loads configs/paper/NAME.py as train.py does: by path, from the root of the repository."""
    monkeypatch.syspath_prepend(ROOT)

    def load(name):
        file = ROOT / "configs" / "paper" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return config.from_config_dict(module.get_config()), module.__doc__

    return load


def matrices(width, hidden, ffns):
    """Embedding and head, and per layer four projections and ``ffns`` SwiGLUs of three matrices."""
    return 2 * VOCABULARY * width + LAYERS * (4 * width * width + ffns * 3 * width * hidden)


def norms(width):
    """Two per layer and the last one."""
    return (2 * LAYERS + 1) * width


def test_matrices_are_those_of_the_design():
    # 65.536M + 24 * (4.194304M + 8.650752M); the published figures cut off or round these.
    assert matrices(1024, 2816, 1) == 373_817_344  # 373.8M
    assert matrices(1280, 3584, 1) == 569_507_840  # 569.5M
    assert matrices(1024, 2816, EXPERTS) == 3_488_088_064  # 3.488B
    assert matrices(1024, 2816, 2) == 581_435_392  # 581.4M


@pytest.mark.parametrize(
    ("name", "width", "hidden"), [("dense_374m", 1024, 2816), ("dense_570m", 1280, 3584)]
)
def test_dense(load, name, width, hidden):
    settings, about = load(name)
    total = matrices(width, hidden, 1) + norms(width)
    assert count_parameters(settings.model) == total
    assert active_parameters(settings.model, 0) == total
    assert f"{total:,}" in about


@pytest.mark.parametrize("name", ["moe_top1", "moe_top2", "moe_dynamic"])
def test_mixture(load, name):
    settings, about = load(name)
    model = settings.model
    routers = LAYERS * 1024 * EXPERTS
    rest = norms(1024) + routers
    total = matrices(1024, 2816, EXPERTS) + rest
    assert count_parameters(model) == total
    assert f"{total:,}" in about
    for k in (1, 2):
        assert active_parameters(model, k) == matrices(1024, 2816, k) + rest
    if model.moe.router == "top_k":
        assert f"{active_parameters(model, model.moe.top_k.k):,}" in about


def test_active_parameters_at_a_mean_that_is_not_whole(load):
    settings, _ = load("moe_dynamic")
    one, two = (active_parameters(settings.model, k) for k in (1, 2))
    assert active_parameters(settings.model, 1.76) == round(one + 0.76 * (two - one))


@pytest.mark.parametrize("name", NAMES)
def test_training_is_the_papers(load, name):
    settings, about = load(name)
    tokens = settings.train.steps * settings.train.batch_size * settings.data.seq_len
    assert 100e9 <= tokens < 100.01e9
    assert settings.data.seq_len == 2048
    assert settings.model.init_std == 0.006
    routers = [moe.route for moe in settings.model.moe_settings]
    weights = coefficients(all_kinds(settings.loss), routers)
    assert set(weights.get("balance", ())) == ({1e-2} if routers else set())
    wanted = 0.0 if name in ("moe_top1", "moe_top2") else 1e-4
    assert set(weights.get("entropy", ())) == ({wanted} if routers else set())
    assert (settings.optimizer.b1, settings.optimizer.b2) == (0.9, 0.95)
    assert settings.optimizer.weight_decay == 0.1
    assert f"--config=configs/paper/{name}.py" in about


def test_routers(load):
    moe = {name: load(name)[0].model.moe for name in NAMES}
    assert [moe[name].every_n_layers for name in NAMES] == [0, 0, 1, 1, 1]
    assert (moe["moe_top1"].router, moe["moe_top1"].top_k.k) == ("top_k", 1)
    assert (moe["moe_top2"].router, moe["moe_top2"].top_k.k) == ("top_k", 2)
    assert (moe["moe_dynamic"].router, moe["moe_dynamic"].top_p.threshold) == ("top_p", 0.4)
    # The paper weighs by raw probabilities; GShard by those of the pair, made to sum to one.
    assert [moe[name].route.renormalize for name in NAMES] == [name == "moe_top2" for name in NAMES]
