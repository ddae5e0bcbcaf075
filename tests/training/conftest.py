"""Fixtures of a small run (``tests/small_run.py``), and what spares runs after the first one."""

import functools

import jax
import pytest

from dynmoe_jax.evaluation.heldout import make_eval_step
from dynmoe_jax.inference.generate import Generator
from dynmoe_jax.training import finish, heldout, start, step
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


_SHAPES, _STEPS, _FIRST, _WRITING = {}, {}, {}, {}


def _key(run):
    cfg = run.cfg
    shaping = (cfg.model, cfg.loss, cfg.optimizer, cfg.train, cfg.data.seq_len, run.mesh)
    return repr((*shaping, run.mesh.device_ids.tolist()))


@pytest.fixture(autouse=True, scope="module")
def traced_once():
    """Runs of equal settings on equal devices share the programs that the first one has compiled.

    To trace and lower them anew takes longer than all that such a run computes.
    """
    placed_shapes, compile_step, first_state = (
        start._placed_shapes, start._compile, start._first_state
    )  # fmt: skip
    generator_of = Generator.__init__

    def shapes_of(run, init):
        key = _key(run), init.func
        if key not in _SHAPES:
            _SHAPES[key] = placed_shapes(run, init)
        return _SHAPES[key]

    def compiled(run, step, shapes):
        key = _key(run)
        if key not in _STEPS:
            _STEPS[key] = compile_step(run, step, shapes)
        return _STEPS[key]

    def first(run, done, init, optimizer, shapes):
        # Tests that draw another first state do so anew.
        if done or run.cfg.train.init_from or init.func is not step.init_state:
            return first_state(run, done, init, optimizer, shapes)
        key = _key(run)
        if key not in _FIRST:
            _FIRST[key] = jax.jit(init, out_shardings=start._shardings(shapes))
        return _FIRST[key](jax.random.key(run.cfg.seed))

    def generator(self, decoder, **keywords):
        generator_of(self, decoder, **keywords)
        lying = [leaf.sharding for leaf in jax.tree.leaves((self._params, self._layers))]
        key = self._structure, self._whole, self._layers is None, *lying
        self._compiled = _WRITING.setdefault(key, {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "_placed_shapes", shapes_of)
        patch.setattr(start, "_compile", compiled)
        patch.setattr(start, "_first_state", first)
        patch.setattr(Generator, "__init__", generator)
        patch.setattr(heldout, "make_eval_step", _eval_step)
        yield


@pytest.fixture(autouse=True)
def report_drawn_once(monkeypatch):
    """Runs of fixtures draw their report, those of single tests leave an empty file for it."""
    monkeypatch.setattr(finish, "write_report", lambda folder, *_: (folder / "report.html").touch())
