"""A kind of expert that only this file registers: it trains, resumes and is evaluated, is reported,
and is refused by whoever does not know it."""

import dataclasses
import json

import pytest

from dynmoe_jax import config
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.interop.export_model import export_model
from dynmoe_jax.registry import EXPERTS
from dynmoe_jax.runs.checkpoint import saved_config
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.training.trainer import train
from tests.experts.kinds.toy_kinds import Biased


def test_a_new_kind_is_one_class_and_one_line(settings, tmp_path, capsys):
    run = tmp_path / "run"
    with EXPERTS.temporarily("biased", Biased):
        asked = config.to_dict(settings)
        asked["model"]["num_layers"], asked["train"]["steps"] = 1, 2
        asked["model"]["moe"] |= {"experts": "biased", "biased": {"slope": 2.0}}
        cfg = config.from_config_dict(asked)
        assert train(cfg, run) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "Kernels do not know experts of the kind config.model.moe.experts='biased'" in shown
        longer = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=3))
        assert train(longer, run) == 0
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3]
        assert (run / "report.html").stat().st_size > 10_000
        found, decoder, _ = load_run(run)
        assert found.model.moe.expert_kind == Biased(slope=2.0)
        assert decoder.groups.layers[0].feed_forward.down_bias_ED.shape == (1, 4, 16)
        with pytest.raises(
            CheckpointError, match=r"no format .* without .*config\.model\.moe\.exp"
        ):
            export_model(run, tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"config\.model\.moe\.experts='biased'"):
        saved_config(run)
