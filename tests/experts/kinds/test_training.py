"""A kind of expert that only this file registers: it trains, resumes, is reported, and is refused
by whoever does not know it."""

import json
import shutil

import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.interop.export_model import export_model
from dynmoe_jax.registry import EXPERTS
from dynmoe_jax.runs.begun import saved_config
from dynmoe_jax.runs.checkpoint import FOLDER
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.training import trainer
from dynmoe_jax.training.log import hardware
from tests.experts.kinds.toy_kinds import Biased


def test_a_new_kind_is_one_class_and_one_line(settings, saved_state, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(hardware, "measured_matmul_flops_per_second", lambda: 1e9)
    with EXPERTS.temporarily("biased", Biased):
        asked = config.to_dict(settings)
        asked["model"]["num_layers"], asked["train"]["steps"] = 2, 3
        asked["model"] |= {"activation": "biased", "biased": {"slope": 1.25}}
        asked["model"]["moe"]["dense_first_layers"] = 1
        asked["checkpoint"]["every_steps"] = 2
        asked["data"]["seq_len"] = asked["model"]["max_seq_len"] = 8
        asked["evaluation"]["sample_tokens"] = 1
        asked["model"]["moe"] |= {"experts": "biased", "biased": {"slope": 2.0}}
        asked["model"]["moe"] |= {"router": "top_k", "top_k": {"net": "tanh"}}
        cfg = config.from_config_dict(asked)
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "finish_run", lambda *_: None)  # as if it ended before
            assert trainer.train(cfg, run) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "Kernels do not know experts of the kind config.model.moe.experts='biased'" in shown
        unbroken = saved_state(run, 3)
        shutil.rmtree(run / FOLDER / "3")
        assert trainer.train(cfg, run) == 0
        assert "Continuing" in capsys.readouterr().out
        for path, array in saved_state(run, 3).items():
            np.testing.assert_array_equal(array, unbroken[path])
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
        assert (run / "report.html").stat().st_size > 10_000
        found, decoder, _ = load_run(run)
        assert found.model.moe.expert_kind == Biased(slope=2.0)
        assert found.model.feed_forward_kind == Biased(slope=1.25)
        assert decoder.moe_layers == [range(1, 2)]
        without = r"no format .* config\.model\.activation.*config\.model\.moe\.exp"
        with pytest.raises(CheckpointError, match=without):
            export_model(run, tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"config\.model\.activation='biased'"):
        saved_config(run)
