"""Fixtures of a small run (``tests/small_run.py``), and what spares runs after the first one."""

import functools

import jax
import pytest

from dynmoe_jax.evaluation.heldout import make_eval_step
from dynmoe_jax.inference.generate import Generator
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


_STEPS, _FIRST, _WRITING = {}, {}, {}


def _key(cfg, mesh):
    shaping = (cfg.model, cfg.loss, cfg.optimizer, cfg.train, cfg.data.seq_len, mesh)
    return repr((*shaping, mesh.device_ids.tolist()))


@pytest.fixture(autouse=True, scope="module")
def traced_once():
    """Runs of equal settings on equal devices share the programs that the first one has compiled.

    To trace and lower them anew takes longer than all that such a run computes.
    """
    compile_step, generator_of = start.compile_step, Generator.__init__

    def compiled(cfg, mesh, objective=None, rewound=()):
        key = _key(cfg, mesh), rewound
        if key not in _STEPS:
            _STEPS[key] = compile_step(cfg, mesh, objective, rewound)
        return _STEPS[key]

    def first(cfg, shapes):
        # Tests that draw another first state do so anew.
        key = _key(cfg, shapes.step.sharding.mesh), start.init_state
        if key not in _FIRST:
            init = functools.partial(start.init_state, cfg, start._optimizer(cfg))
            _FIRST[key] = jax.jit(init, out_shardings=start._shardings(shapes))
        return _FIRST[key](jax.random.key(cfg.seed))

    def generator(self, decoder, **keywords):
        generator_of(self, decoder, **keywords)
        lying = [leaf.sharding for leaf in jax.tree.leaves((self._params, self._layers))]
        key = self._structure, self._whole, self._layers is None, *lying
        self._compiled = _WRITING.setdefault(key, {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "compile_step", compiled)
        patch.setattr(start, "new_state", first)
        patch.setattr(Generator, "__init__", generator)
        patch.setattr(heldout, "make_eval_step", _eval_step)
        yield


@pytest.fixture(autouse=True)
def report_drawn_once(monkeypatch):
    """Runs of fixtures draw their report, those of single tests leave an empty file for it."""
    monkeypatch.setattr(finish, "write_report", lambda folder, *_: (folder / "report.html").touch())
