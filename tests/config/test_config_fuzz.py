"""Settings at random: each set is refused in one sentence before compiling, or trained."""

import dataclasses
import functools
import math
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.config_fuzz import (
    LEAVES,
    TINY,
    accept_or_refuse,
    check_step,
    compiled,
    draw_batch,
    first_step,
    nested,
)
from dynmoe_jax import config

pytestmark = pytest.mark.slow

PROGRAMS = (
    {},
    # Every number of experts at its edge, and no choice at all.
    {
        "model.moe.num_experts": 1,
        "model.moe.top_p.threshold": 1.0,
        "model.moe.capacity_factor": 1.2e-38,
        "model.moe.backend": "capacity",
        "train.microbatches": 1,
        "optimizer.b1": 0.0,
        "optimizer.b2": 0.0,
        "loss.chunk_tokens": 2**31 - 1,
    },
    # Budgets of one row, one layer, one position at a time.
    {
        "model.moe.transforms": "row_budget",
        "model.moe.row_budget.rows_per_token": 1.2e-38,
        "model.moe.top_p.renormalize": True,
        "model.moe.every_n_layers": 2,
        "model.remat": "layer",
        "model.tie_embeddings": True,
        "loss.chunk_tokens": 1,
        "loss.balance.counts": "per_choice",
        "optimizer.warmup_steps": 2**31 - 1,
        "train.steps": 2**31 - 1,
    },
    # Numbers at the ends of float32.
    {
        "model.norm_epsilon": 1.2e-38,
        "model.rope_theta": 3.4e38,
        "model.init_std": 1.2e-38,
        "optimizer.epsilon": 1.2e-38,
        "optimizer.learning_rate": 1.2e-38,
        "optimizer.clip_norm": 3.4e38,
        "loss.router_z.weight": 3.4e38,
        "train.steps": 1,
        "train.spike_deviations": 3.4e38,
    },
    {
        "model.init_std": 3.4e38,
        "model.moe.every_n_layers": 0,
        "optimizer.schedule": "warmup_stable_decay",
        "optimizer.decay_fraction": 1.2e-38,
        "train.microbatches": 1,
    },
    # As many rows as there can be, through the backend of this machine, in bfloat16.
    {
        "model.moe.router": "top_k",
        "model.moe.top_k.k": 3,
        "model.moe.backend": "grouped",
        "model.moe.saved_rows_per_token": 3.4e38,
        "model.moe.transforms": "row_budget",
        "model.moe.row_budget.rows_per_token": 3.4e38,
        "model.dtype": "bfloat16",
        "model.num_layers": 1,
    },
)
"""Settings that shape the compiled step, many edges in each: they are what costs time here."""

SHAPES_PROGRAM = ("model.", "loss.", "optimizer.", "mesh.", "train.steps", "train.batch_size")
SHAPES_PROGRAM += ("train.microbatches", "train.max_skipped", "train.spike_dev", "data.seq_len")
SHAPES_PROGRAM += ("train.objective", "train.trainable")
# A folder must be there for what reads it, and these would be read.
LEFT_OUT = ("data.sources", "logging.wandb_project")
FREE = [path for path in LEAVES if not path.startswith((*SHAPES_PROGRAM, *LEFT_OUT))]

NEVER = st.one_of(
    st.none(),
    st.integers(max_value=-2),
    st.integers(min_value=10**39),
    st.just(10**400),
    st.floats(max_value=-1.001),  # -1 is auto
    st.sampled_from([math.nan, math.inf]),
    st.text(max_size=6).map("?".__add__),
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), min_size=1, max_size=2),
)
"""Values that no setting which shapes the compiled step can have."""

NOISE = st.one_of(NEVER, st.booleans(), st.integers(), st.floats(), st.text(max_size=6))
NAMES = st.one_of(
    st.sampled_from(list(LEAVES)),
    st.sampled_from(["model", "model.moe", "train", "data"]),
    st.text(min_size=1, max_size=8),
    st.from_regex(r"(model|train|data)\.(moe\.)?[a-z_]{1,10}", fullmatch=True),
)


def _right(path):
    """Values of a setting's own type, most of them in its range."""
    field = LEAVES[path]
    rule = field.metadata
    if field.type is bool:
        return st.booleans()
    if field.type is str:
        return st.sampled_from(list(rule["choices"])) if rule["choices"] else st.text(max_size=12)
    low = rule["low"] if rule["low"] is not None else rule["above"]
    high = rule["high"] if rule["high"] is not None else 1e6
    if field.type is int:
        return st.integers(int(low) - 1, int(high) + 1)
    return st.floats(low, high)


def _noise(name):
    shapes = name in LEAVES and name not in FREE
    return st.tuples(st.just(name), NEVER if shapes else NOISE)


FREE_VALUES = st.sampled_from(FREE).flatmap(lambda path: st.tuples(st.just(path), _right(path)))
"""A setting that leaves the compiled step alone, and a value that may be accepted."""


@functools.cache
def step_of(program):
    """The first step of a program, from key and batch."""
    return compiled(first_step(config.from_config_dict(_settings(program))))


def _settings(program, values=()):
    return nested(TINY | PROGRAMS[program] | dict(values))


def shape_of(cfg):
    """What the compiled step depends on."""
    free = {path.partition(".")[2] for path in FREE if path.startswith("train.")}
    train = {name: value for name, value in vars(cfg.train).items() if name not in free}
    return cfg.model, cfg.loss, cfg.optimizer, cfg.data.seq_len, tuple(train.items())


def test_settings_are_refused_in_one_sentence_or_train(fuzz_cases):
    cases, counts = fuzz_cases(300, 2000), Counter()

    @settings(
        max_examples=cases, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(
        program=st.integers(0, len(PROGRAMS) - 1),
        free=st.lists(FREE_VALUES, max_size=2),
        noise=st.lists(NAMES.flatmap(_noise), max_size=1),
    )
    def try_one(program, free, noise):
        counts["cases"] += 1
        found = accept_or_refuse(PROGRAMS[program] | dict(free) | dict(noise))
        if isinstance(found, str):
            counts["refused"] += 1
            return
        # Else the step that was compiled would not be the one that these settings make.
        assert shape_of(found) == shape_of(config.from_config_dict(_settings(program)))
        state, metrics = step_of(program)(jax.random.key(0), draw_batch(found))
        counts["trained" if check_step(state, metrics) else "skipped"] += 1

    try_one()
    assert counts["cases"] >= cases
    assert counts["refused"] > cases / 5
    assert counts["trained"] > cases / 10
    assert counts["skipped"] > 0  # of numbers at the ends of float32


@pytest.mark.parametrize("program", range(len(PROGRAMS)))
def test_every_program_gives_finite_parameters_or_skips(program):
    cfg = config.from_config_dict(_settings(program))
    state, metrics = step_of(program)(jax.random.key(0), draw_batch(cfg))
    if check_step(state, metrics):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"optimizer.learning_rate": 1e300}, "is no number in float32"),
        ({"optimizer.epsilon": 1e-300}, "is no number in float32"),
        ({"train.steps": 10**18}, "which 32 bits hold"),
        ({"model.attention": "cudnn"}, "needs a GPU"),
        ({"data.virtual_shards": 10**6}, "must be at most 4096"),
        ({"data.directory": "a\0b"}, "NUL"),
        ({"evaluation.prompt": "\ud800"}, "lone surrogate"),
        ({"data.tokenizer": "a" * 300}, "does not exist"),
        ({"data.tokenizer": "~nobody here/a"}, "does not exist"),
        ({"data.sources": "text:~nobody here/a"}, "matches no file"),
        ({"data.directory": "a" * 300}, "cannot be a folder (File name too long); name another"),
        ({"train.compilation_cache": "~nobody here/a"}, "cannot be a folder (no such home)"),
        ({"data.domain_weights": "a=1e300,b=1"}, "between 1e-06 and 1e+06"),
        ({"train.batch_size": 2**30}, "Training needs"),
        ({"model.vocab_size": 2**31 - 1}, "lower config.model.vocab_size from 2147483647 to"),
        ({"model.moe.hidden_width": 2**31 - 1}, "lower config.model.moe.hidden_width from"),
    ],
)
def test_what_used_to_fail_later_is_refused(values, sentence):
    assert sentence in accept_or_refuse(values)


def test_edges_of_programs_are_of_settings_that_exist():
    for program in PROGRAMS:
        assert set(program) <= set(LEAVES)
    assert dataclasses.is_dataclass(accept_or_refuse({}))
