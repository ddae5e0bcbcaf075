"""Compile time of the train step by depth: layers are scanned, so it should hardly grow.

    python -m benchmarks.compile_time --layers 2 24 --rounds 5

Each round lowers and compiles every depth once, at a small width, for the devices that are there.
"""

import argparse
import math
import time
from functools import partial

import jax
import jax.numpy as jnp
from jax.stages import Compiled

from benchmarks.command import run
from dynmoe_jax import config
from dynmoe_jax.data import BATCH_ARRAYS
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import init_state, make_train_step

SEQ_LEN = 64
BATCH_SIZE = 8


def settings(layers: int, backend: str) -> config.Config:
    """A Top-P MoE model of that depth, small in every other way."""
    model = config.Model(
        num_layers=layers,
        width=64,
        num_heads=4,
        num_kv_heads=4,
        head_width=16,
        vocab_size=512,
        max_seq_len=SEQ_LEN,
        moe=config.MoE(num_experts=8, hidden_width=64, backend=backend),
    )
    train = config.Train(batch_size=BATCH_SIZE)
    return config.Config(model=model, data=config.Data(seq_len=SEQ_LEN), train=train)


def compile_step(layers: int, backend: str = "auto") -> Compiled:
    """Lowers and compiles the train step of a model of that depth."""
    return compile_step_of(settings(layers, backend))


def compile_step_of(cfg: config.Config) -> Compiled:
    """Lowers and compiles the train step; nothing is allocated."""
    schedule = make_schedule(cfg.optimizer, cfg.train.steps)
    optimizer = make_optimizer(cfg.optimizer, schedule)
    state = jax.eval_shape(partial(init_state, cfg, optimizer), jax.random.key(0))
    array_BL = jax.ShapeDtypeStruct((BATCH_SIZE, SEQ_LEN), jnp.int32)
    batch = dict.fromkeys(BATCH_ARRAYS, array_BL)
    train_step = make_train_step(cfg, optimizer, schedule)
    return jax.jit(train_step, donate_argnums=0).lower(state, batch).compile()


def instructions(compiled: Compiled) -> int:
    """Instructions of the optimised program."""
    return sum(" = " in line for line in compiled.as_text().splitlines())


def main() -> None:
    """Prints seconds, relative to the first depth too, and instructions for each depth."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 24], help="depths")
    parser.add_argument("--rounds", type=int, default=5, help="compilations of each depth")
    asked = parser.parse_args()
    fastest, sizes = dict.fromkeys(asked.layers, math.inf), {}
    for _ in range(asked.rounds):
        for layers in asked.layers:
            start = time.perf_counter()
            compiled = compile_step(layers)
            fastest[layers] = min(fastest[layers], time.perf_counter() - start)
            sizes[layers] = instructions(compiled)
    first = fastest[asked.layers[0]]
    print("layers   fastest of all    relative   instructions")
    for layers, seconds in fastest.items():
        print(f"{layers:>6} {seconds:>14.2f} s {seconds / first:>11.2f} {sizes[layers]:>14,}")


if __name__ == "__main__":
    run(main)
