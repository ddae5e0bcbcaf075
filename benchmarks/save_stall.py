"""What saving costs the steps that run meanwhile.

    python -m benchmarks.save_stall --rounds=3

Trains a model of 100M parameters (1.2 GB of state with AdamW's moments), and saves as the trainer
does.  Each round times steps without a save, then the call that starts one and the steps until
all is on disk.  Printed: seconds of the call, in which training waits; steps while saving over
steps without, the call included; and the same over as many steps as lie between two checkpoints.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.command import run
from benchmarks.machine import describe
from dynmoe_jax import config
from dynmoe_jax.console import console
from dynmoe_jax.model.parameters import count_parameters
from dynmoe_jax.runs.begun import make_folder
from dynmoe_jax.runs.checkpoint import Checkpoints
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import TrainState, init_state, make_train_step


def settings(batch_size: int, seq_len: int) -> config.Config:
    """A Top-P MoE of 100M parameters."""
    model = config.Model(
        num_layers=6,
        width=512,
        num_heads=8,
        num_kv_heads=8,
        head_width=64,
        vocab_size=16_000,
        max_seq_len=seq_len,
        moe=config.MoE(num_experts=8, hidden_width=1024),
    )
    return config.Config(
        model=model,
        loss=config.Loss(chunk_tokens=512),
        data=config.Data(seq_len=seq_len),
        train=config.Train(batch_size=batch_size),
    )


class Trainer:
    """The state and the compiled step of a run on drawn tokens."""

    def __init__(self, cfg: config.Config):
        self.cfg = cfg
        schedule = make_schedule(cfg.optimizer, cfg.train.steps)
        optimizer = make_optimizer(cfg.optimizer, schedule)
        self.state: TrainState = jax.jit(lambda key: init_state(cfg, optimizer, key))(
            jax.random.key(0)
        )
        shape = (cfg.train.batch_size, cfg.data.seq_len)
        tokens_BL = np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape, np.int32)
        ones_BL = np.ones(shape, np.int32)
        positions_BL = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        self.batch = {
            "tokens": jnp.asarray(tokens_BL),
            "targets": jnp.asarray(np.roll(tokens_BL, -1, axis=1)),
            "segment_ids": jnp.asarray(ones_BL),
            "positions": jnp.asarray(positions_BL),
        }
        self._step = jax.jit(make_train_step(cfg, optimizer, schedule), donate_argnums=0)
        self.steps = 0

    def seconds(self) -> float:
        """One step."""
        begin = time.perf_counter()
        self.state, _ = self._step(self.state, self.batch)
        jax.block_until_ready(self.state)
        self.steps += 1
        return time.perf_counter() - begin

    def saving(self, checkpoints: Checkpoints) -> tuple[float, list[float]]:
        """Seconds of the call that starts a save, and of each step that began before its end."""
        begin = time.perf_counter()
        checkpoints.save(self.steps, self.state, {}, self.cfg)
        call = time.perf_counter() - begin
        return call, list(_while(checkpoints.is_saving, self.seconds))


def _while(going_on: Callable[[], bool], measure: Callable[[], float]) -> Iterator[float]:
    while going_on():
        yield measure()


@dataclasses.dataclass(frozen=True)
class Round:
    """Seconds in one round."""

    without: list[float]
    call: float
    during: list[float]

    def ratio(self, over: int) -> float:
        """Time of ``over`` steps with a save in them, over that without; 0: while it is saved."""
        step = statistics.median(self.without)
        steps = len(self.during)
        rest = max(0, over - steps)
        return (self.call + sum(self.during) + rest * step) / ((steps + rest) * step)


def main() -> None:
    """Measures, prints and, if asked, writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="saves")
    parser.add_argument("--steps", type=int, default=6, help="steps without a save in each round")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a step")
    parser.add_argument("--seq-len", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--every", type=int, default=100, help="steps between two checkpoints")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    asked = parser.parse_args()
    cfg = settings(asked.batch_size, asked.seq_len)
    trainer = Trainer(cfg)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.state)) / 1e9
    console.print(f"{count_parameters(cfg.model) / 1e6:.1f}M parameters, {size:.2f} GB of state")
    rounds = []
    with tempfile.TemporaryDirectory(prefix="save_stall_") as name:
        make_folder(Path(name))
        checkpoints = Checkpoints(Path(name), config.Checkpoint(keep=1))
        for number in range(asked.rounds + 1):  # the first one warms up
            trainer.seconds()
            without = [trainer.seconds() for _ in range(asked.steps)]
            call, during = trainer.saving(checkpoints)
            checkpoints.wait()
            one = Round(without, call, during)
            if number:
                rounds.append(one)
            console.print(
                f"round {number}: step {statistics.median(without):.3f} s, call {call:.3f} s, "
                f"{len(during)} steps while saving {statistics.median(during):.3f} s, "
                f"ratio {one.ratio(0):.2f}, over {asked.every} steps {one.ratio(asked.every):.3f}"
            )
        checkpoints.close()
    figures = {
        "step_seconds": statistics.median(s for one in rounds for s in one.without),
        "call_seconds": statistics.median(one.call for one in rounds),
        "steps_while_saving": statistics.median(len(one.during) for one in rounds),
        "ratio_while_saving": statistics.median(one.ratio(0) for one in rounds),
        f"ratio_over_{asked.every}_steps": statistics.median(
            one.ratio(asked.every) for one in rounds
        ),
        "rounds": asked.rounds,
        "machine": describe("benchmarks.save_stall"),
    }
    for key, value in figures.items():
        console.print(f"{key:<24} {value}", markup=False)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
