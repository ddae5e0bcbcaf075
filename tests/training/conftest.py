"""Fixtures of a small run (``tests/small_run.py``), and what spares runs after the first one."""

import functools

import pytest

from dynmoe_jax.evaluation.heldout import make_eval_step
from dynmoe_jax.training import finish, heldout, start
from tests.small_run import (
    change_fixture,
    corpus,
    saved_state,
    settings,
    state,
    tokenizer,
    workdir,
)

__all__ = [
    "change_fixture",
    "corpus",
    "saved_state",
    "settings",
    "state",
    "tokenizer",
    "workdir",
]


@functools.cache
def _eval_step(structure, loss):
    return make_eval_step(structure, loss)


_STEPS = {}


@pytest.fixture(autouse=True, scope="module")
def traced_once():
    """Runs of equal settings on equal devices share the programs that the first one has compiled.

    To trace and lower them anew takes longer than all that such a run computes.
    """
    compile_step = start._compile

    def compiled(run, step, shapes):
        cfg = run.cfg
        shaping = (cfg.model, cfg.loss, cfg.optimizer, cfg.train, cfg.data.seq_len, run.mesh)
        key = repr((*shaping, run.mesh.device_ids.tolist()))
        if key not in _STEPS:
            _STEPS[key] = compile_step(run, step, shapes)
        return _STEPS[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "_compile", compiled)
        patch.setattr(heldout, "make_eval_step", _eval_step)
        yield


@pytest.fixture(autouse=True)
def report_drawn_once(monkeypatch):
    """Runs of fixtures draw their report, those of single tests leave an empty file for it."""
    monkeypatch.setattr(finish, "write_report", lambda folder, *_: (folder / "report.html").touch())
