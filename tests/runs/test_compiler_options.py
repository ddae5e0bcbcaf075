"""Options of the compiler: each platform's own, and no run fails for want of them."""

import re

import jax
import pytest

from benchmarks.train_cases import PRESETS, cases, draw_tokens, settings
from benchmarks.train_jax import batch_of
from dynmoe_jax.hardware.target import Target
from dynmoe_jax.runs.compilation import CPU_OPTIONS, compiler_options
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import init_state, make_train_step


def test_a_compiler_that_does_not_know_them_gets_none(capsys):
    # The compiler at hand is one for CPU.
    assert compiler_options(Target("tpu", "of another version")) == {}
    assert "XLA compiles without options" in capsys.readouterr().out.replace("\n", " ")


@pytest.fixture(scope="module")
def lowered():
    """A training step whose state is donated."""
    preset = PRESETS["tiny"]
    cfg = settings(preset, cases(preset)["top_2"])
    schedule = make_schedule(cfg.optimizer, cfg.train.steps)
    optimizer = make_optimizer(cfg.optimizer, schedule)
    init = lambda key: init_state(cfg, optimizer, key)  # noqa: E731
    shapes = jax.eval_shape(init, jax.random.key(0))
    step = jax.jit(make_train_step(cfg, optimizer, schedule), donate_argnums=0)
    return step.lower(shapes, batch_of(draw_tokens(preset)))


@pytest.mark.parametrize(("options", "copies"), [(CPU_OPTIONS, False), ({}, True)])
def test_moments_are_updated_in_place(options, copies, lowered):
    program = lowered.compile(options).as_text()
    assert bool(re.search(r"copy\(%state_optimizer\S*gate_up", program)) == copies
