"""Names that settings had before: refused with the new one where written, moved where stored."""

import dataclasses
import json
from pathlib import Path

import pytest

from dynmoe_jax import command_line, config
from dynmoe_jax.fields import free_setting
from dynmoe_jax.registry import LOSSES, ROUTERS
from dynmoe_jax.routing import TopP
from dynmoe_jax.routing.losses import RoutingLoss

ROOT = Path(__file__).parents[2]

OLD_AND_NEW = [
    ("model.moe.top_p", "0.4", "config.model.moe.top_p.threshold"),
    ("model.moe.top_k", "2", "config.model.moe.top_k.k"),
    ("model.moe.rows_per_token", "1.5", "config.model.moe.row_budget.rows_per_token"),
    ("loss.balance_weight", "0.01", "config.loss.balance.weight"),
    ("loss.balance_counts", "sum", "config.loss.balance.counts"),
    ("loss.balance_over", "batch", "config.loss.balance.over"),
    ("loss.entropy_weight", "0.0", "config.loss.entropy.weight"),
    ("loss.router_z_weight", "0.0", "config.loss.router_z.weight"),
]


@dataclasses.dataclass(frozen=True)
class OwnRouter(TopP):
    """A router that only some processes know."""

    patience: int = free_setting(3, "of the router", low=0)


def refusal(build):
    with pytest.raises(config.ConfigError) as caught:
        build()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def parse(monkeypatch):
    """Parses a command line as train.py does."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    return lambda *arguments: command_line.parse(["train.py", *arguments])


@pytest.mark.parametrize(("old", "value", "new"), OLD_AND_NEW)
def test_an_old_name_on_the_command_line_is_refused_with_the_new_one(parse, old, value, new):
    sentence = refusal(lambda: parse(f"--config.{old}={value}"))
    assert sentence == f"config.{old} is called {new} now."


def test_a_name_that_is_two_now_is_refused_with_both(parse):
    sentence = refusal(lambda: parse("--config.model.moe.renormalize=true"))
    for router in ("top_p", "top_k"):
        assert f"config.model.moe.{router}.renormalize" in sentence


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("config.MoE(top_p=0.3)", "MoE(top_p={'threshold': …})"),
        ("config.MoE(top_k=2)", "MoE(top_k={'k': …})"),
        ("config.MoE(rows_per_token=1.5)", "MoE(row_budget={'rows_per_token': …})"),
        ("config.Loss(balance_weight=0.01)", "Loss(balance={'weight': …})"),
        ("dataclasses.replace(config.Loss(), entropy_weight=0.0)", "Loss(entropy={'weight': …})"),
    ],
)
def test_an_old_name_in_a_config_file_is_refused_with_the_new_one(parse, tmp_path, old, new):
    file = tmp_path / "old.py"
    file.write_text(
        "import dataclasses\nfrom dynmoe_jax import config\n"
        f"def get_config():\n    return config.to_config_dict(config.Config({old}))\n"
    )
    assert f" is now {new}." in refusal(lambda: parse(f"--config={file}"))


def test_an_old_value_in_place_of_a_group_is_refused_with_the_new_name():
    edited = config.to_config_dict(config.Config())
    del edited.model.moe["top_p"]
    edited.model.moe.top_p = 0.3
    sentence = refusal(lambda: config.from_config_dict(edited))
    assert sentence == "config.model.moe.top_p is called config.model.moe.top_p.threshold now."


def stored(moe=None, loss=None):
    """Settings as a run of before has stored them."""
    old_moe = {"top_p": 0.4, "top_k": 2, "renormalize": False, "rows_per_token": 0.0}
    old_moe |= {"router": "top_p", "saved_rows_per_token": -1.0}
    old_loss = {"balance_weight": 0.01, "balance_counts": "sum", "balance_over": "batch"}
    old_loss |= {"entropy_weight": 1e-4, "router_z_weight": 0.0}
    return {"model": {"moe": old_moe | (moe or {})}, "loss": old_loss | (loss or {})}


def test_stored_settings_of_a_top_p_run_are_moved():
    cfg = config.from_stored(stored({"top_p": 0.3, "top_k": 5, "renormalize": True}))
    assert cfg.model.moe == config.MoE(top_p={"threshold": 0.3, "renormalize": True})


def test_stored_settings_of_a_top_k_run_are_moved():
    cfg = config.from_stored(stored({"router": "top_k", "top_k": 1, "top_p": 0.7}))
    assert cfg.model.moe == config.MoE(router="top_k", top_k={"k": 1})


def test_a_stored_row_budget_becomes_a_transform():
    cfg = config.from_stored(stored({"rows_per_token": 1.5}))
    budget = {"rows_per_token": 1.5}
    assert cfg.model.moe == config.MoE(transforms="row_budget", row_budget=budget)


def test_stored_losses_are_moved():
    loss = {"balance_weight": 0.5, "balance_counts": "per_choice", "balance_over": "microbatch"}
    cfg = config.from_stored(stored(loss=loss | {"entropy_weight": 0.0, "router_z_weight": 1e-3}))
    assert cfg.loss == config.Loss(
        balance={"weight": 0.5, "counts": "per_choice", "over": "microbatch"},
        entropy={"weight": 0.0},
        router_z={"weight": 1e-3},
    )


def test_new_settings_are_read_back_as_they_were_stored():
    cfg = config.Config(
        model=config.Model(moe=config.MoE(router="top_k", top_k={"k": 3, "renormalize": True})),
        loss=config.Loss(balance={"weight": 0.1}),
    )
    assert config.from_stored(json.loads(json.dumps(config.to_dict(cfg)))) == cfg


def test_stored_groups_of_kinds_that_are_not_imported_are_kept_and_written_back():
    """A run that a plug-in was registered in goes on without it, and back again."""
    with ROUTERS.temporarily("own", OwnRouter), LOSSES.temporarily("their", RoutingLossOfTheirs):
        moe = config.MoE(own={"patience": 3})
        written = config.to_dict(config.Config(model=config.Model(moe=moe)))
    cfg = config.from_stored(written)
    assert cfg == config.Config()
    again = json.loads(json.dumps(config.to_dict(cfg)))
    assert again == json.loads(json.dumps(written))
    with ROUTERS.temporarily("own", OwnRouter), LOSSES.temporarily("their", RoutingLossOfTheirs):
        assert config.from_stored(again).model.moe.own.patience == 3


@dataclasses.dataclass(frozen=True)
class RoutingLossOfTheirs(RoutingLoss):
    """A loss that only some processes know."""

    weight: float = free_setting(0.0, "of the loss", low=0.0)

    def sums(self, routing, given, params):
        """Nothing."""
        return {}

    def value(self, sums, tokens):
        """Zero."""
        return 0.0


def test_a_stored_run_that_needs_a_kind_is_refused_without_it():
    with ROUTERS.temporarily("own", OwnRouter):
        moe = config.MoE(router="own", own={"patience": 5})
        written = config.to_dict(config.Config(model=config.Model(moe=moe)))
    sentence = refusal(lambda: config.from_stored(written))
    assert "config.model.moe.router='own' must be one of" in sentence
    assert "--plugin" in sentence


def test_an_unknown_setting_in_a_stored_group_is_refused():
    """What is kept is whole groups: a name inside a known one would be lost."""
    sentence = refusal(lambda: config.from_stored({"model": {"moe": {"top_p": {"treshold": 0.3}}}}))
    assert "did you mean config.model.moe.top_p.threshold?" in sentence


@pytest.mark.parametrize(
    ("settings", "idle", "choice"),
    [
        ({"top_k": {"k": 3}}, "config.model.moe.top_k.k=3", "router='top_p'"),
        (
            {"router": "top_k", "top_p": {"renormalize": True}},
            "config.model.moe.top_p.renormalize=True",
            "router='top_k'",
        ),
        (
            {"row_budget": {"rows_per_token": 1.5}},
            "config.model.moe.row_budget.rows_per_token=1.5",
            "transforms=''",
        ),
    ],
)
def test_a_setting_of_a_kind_that_is_not_chosen_is_refused(settings, idle, choice):
    moe = config.MoE(**settings)
    sentence = refusal(lambda: config.Config(model=config.Model(moe=moe)))
    assert sentence.startswith(f"{idle} has no effect while config.model.moe.{choice}")
