"""Compile time of the train step where layers differ, against as many equal ones.

    python -m benchmarks.compile_layers --rounds 3

24 equal layers are one scan of one layer.  Four shapes (expert counts and hidden widths) in four
runs of six are four scans, dense and MoE in turns one scan of two layers, and four shapes in random
order as many programs as :func:`dynmoe_jax.model.periods.find_runs` must make of them.  Nothing is
unrolled, so that programs differ in their layers alone.  Each round lowers and compiles every model
once, at a small width, for the devices that are there; models are compared by the seconds of the
processor, which other programs on the machine change little.
"""

import argparse
import dataclasses
import math
import random
import time

from benchmarks.command import run
from benchmarks.compile_time import compile_step_of, instructions, settings
from dynmoe_jax import config
from dynmoe_jax.model.stacks import stacks_of

LAYERS = 24
SHAPES = ((8, 64), (4, 96), (6, 32), (12, 48))
"""(experts, hidden width) of a layer."""


def in_runs() -> list[tuple[int, int]]:
    """The shapes of layers in four runs of six."""
    return [shape for shape in SHAPES for _ in range(LAYERS // len(SHAPES))]


def in_random_order(seed: int = 0) -> list[tuple[int, int]]:
    """The same layers, shuffled."""
    return random.Random(seed).sample(in_runs(), LAYERS)


def with_shapes(cfg: config.Config, shapes: list[tuple[int, int]]) -> config.Config:
    """The settings with these shapes of layers."""
    layers = ";".join(
        f"{i}:moe.num_experts={experts},moe.hidden_width={width}"
        for i, (experts, width) in enumerate(shapes)
    )
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, layers=layers))


def in_turns(cfg: config.Config) -> config.Config:
    """The settings with a dense layer behind every layer with experts."""
    moe = dataclasses.replace(cfg.model.moe, every_n_layers=2)
    model = dataclasses.replace(cfg.model, moe=moe, hidden_width=64)
    return dataclasses.replace(cfg, model=model)


def cases(backend: str = "auto") -> dict[str, config.Config]:
    """The settings by name, the equal layers first."""
    equal = settings(LAYERS, backend)
    equal = dataclasses.replace(equal, model=dataclasses.replace(equal.model, unroll=1))
    return {
        "equal": equal,
        "four runs of six": with_shapes(equal, in_runs()),
        "dense and MoE in turns": in_turns(equal),
        "random order": with_shapes(equal, in_random_order()),
    }


def programs(model: config.Model) -> int:
    """Layers that are compiled, each by itself."""
    return sum(len(stack.run.period) for stack in stacks_of(model))


def main() -> None:
    """Prints seconds, and those of the processor relative to equal layers, as rounds go on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="compilations of each model")
    asked = parser.parse_args()
    models = cases()
    fastest, busy = dict.fromkeys(models, math.inf), dict.fromkeys(models, math.inf)
    print(f"{'24 layers':<24}compiled   fastest  processor  relative  instructions")
    for _ in range(asked.rounds):
        for name, cfg in models.items():
            start, worked = time.perf_counter(), time.process_time()
            compiled = compile_step_of(cfg)
            fastest[name] = min(fastest[name], time.perf_counter() - start)
            busy[name] = min(busy[name], time.process_time() - worked)
            print(
                f"{name:<24}{programs(cfg.model):>8}{fastest[name]:>8.1f} s{busy[name]:>9.1f} s"
                f"{busy[name] / busy['equal']:>10.2f}{instructions(compiled):>14,}",
                flush=True,
            )


if __name__ == "__main__":
    run(main)
