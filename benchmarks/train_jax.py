"""Whole training steps of this project, compiled, for `benchmarks.train_step`."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.train_cases import Case, Preset, draw_tokens, settings
from dynmoe_jax import config
from dynmoe_jax.hardware.target import current_target
from dynmoe_jax.model import decoder_structure
from dynmoe_jax.model.flops import training_flops
from dynmoe_jax.runs.compilation import compiler_options
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import init_state, make_train_step

BISECTIONS = 12
PARTS = 4
"""Of a batch whose routing is looked at, one after the other: the forward pass keeps more than the
step."""


def batch_of(tokens_BL1):
    """One document a sequence."""
    tokens_BL1 = jnp.asarray(tokens_BL1)
    tokens_BL = tokens_BL1[:, :-1]
    return {
        "tokens": tokens_BL,
        "targets": tokens_BL1[:, 1:],
        "segment_ids": jnp.ones_like(tokens_BL),
        "positions": jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape),
    }


class TrainCase:
    """One model with its state, and its compiled training step; a case for timing.

    Attributes:
      compile_s: seconds to compile the step.
      step_bytes: what a step needs, state and batch included.
      tokens: of one step.
      rows: (token, expert) pairs of one step over all layers.
      experts_per_token: mean over tokens and layers; 0 in a dense model.
      flops: of one step, from those rows.
    """

    def __init__(self, preset: Preset, case: Case):
        cfg = settings(preset, case)
        schedule = make_schedule(cfg.optimizer, cfg.train.steps)
        optimizer = make_optimizer(cfg.optimizer, schedule)
        init = jax.jit(lambda key: init_state(cfg, optimizer, key))
        self._state = init(jax.random.key(0))
        self._batch = batch_of(draw_tokens(preset))
        if case.mean:
            self._sharpen(cfg, case.mean)
        begin = time.perf_counter()
        step = jax.jit(make_train_step(cfg, optimizer, schedule), donate_argnums=0)
        options = compiler_options(current_target())
        self._step = step.lower(self._state, self._batch).compile(options)
        self.compile_s = time.perf_counter() - begin
        memory = self._step.memory_analysis()
        self.step_bytes = memory and (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
        self.tokens = preset.batch_size * preset.seq_len
        self()
        self._count(cfg)

    def _count(self, cfg: config.Config) -> None:
        """Counts what the last step has computed."""
        self.rows = int(np.sum(self._metrics["load_NE"]))
        layers = self._metrics["load_NE"].shape[0]
        self.experts_per_token = self.rows / self.tokens / layers if layers else 0.0
        self.flops = training_flops(cfg.model, self.tokens, cfg.data.seq_len, self.rows)

    def __call__(self) -> float:
        """Takes one step; seconds."""
        begin = time.perf_counter()
        self._state, self._metrics = self._step(self._state, self._batch)
        jax.block_until_ready((self._state, self._metrics))
        return time.perf_counter() - begin

    def _sharpen(self, cfg, mean: float) -> None:
        """Scales the routers until the tokens of the batch use ``mean`` experts each."""
        structure = decoder_structure(cfg.model)
        sequences = self._batch["tokens"].shape[0]
        parts = PARTS if sequences % PARTS == 0 else sequences
        batch = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), self._batch)

        @jax.jit
        def experts(params, scale):
            decoder = nnx.merge(structure, _scaled(params, scale))

            def of_part(part):
                layout = part["segment_ids"], part["positions"]
                return jnp.mean(decoder.hidden(part["tokens"], *layout)[1].experts_per_token)

            return jnp.mean(jax.lax.map(of_part, batch))

        params, low, high = self._state.params, 1.0, 4096.0
        for _ in range(BISECTIONS):
            middle = (low * high) ** 0.5
            more = experts(params, middle) > mean
            low, high = (middle, high) if more else (low, middle)
        scaled = jax.jit(_scaled, donate_argnums=0)(params, (low * high) ** 0.5)
        self._state = dataclasses.replace(self._state, params=scaled)


def _scaled(params, scale):
    """The parameters with all routers multiplied by ``scale``."""
    return jax.tree.map_with_path(
        lambda path, x: x * scale if "router_DE" in jax.tree_util.keystr(path) else x, params
    )
