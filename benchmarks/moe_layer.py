"""One MoE layer against what people would use instead.

    python -m benchmarks.moe_layer --preset=cpu --json=moe_layer.json

Forward and forward + backward of router and experts together, for top-1/2/4/7 and for top-p from
sharp to flat routers.  Peers: a dense SwiGLU layer of equal active FLOPs, ``lax.ragged_dot`` and
capacity 1.25 in JAX; with the extra ``bench`` also a PyTorch loop over experts and Hugging Face's
Mixtral block.  All peers see the same tokens, router and weights, and the same cores.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from benchmarks.command import missing, need, run
from benchmarks.layer_cases import PRESETS, Preset, choices, draw
from benchmarks.machine import Copy, pin_threads, with_machine
from benchmarks.timing import interleave, show_progress
from dynmoe_jax.hardware.huge_pages import restart_with_huge_pages

TORCH_METHODS = ("torch_loop", "hf_eager", "hf_grouped_mm")
DEFAULT_METHODS = ("ours", "ours_recompute", "dense", "jax_capacity", "jax_ragged_dot")
JAX_METHODS = (*DEFAULT_METHODS, "jax_tokamax")
"""The last one needs an accelerator, and tokamax."""
DIRECTIONS = ("forward", "train")
DEFAULT_CHOICES = {
    "decode": ("top_1", "top_2", "top_7", "top_p_2"),
    "paper": ("top_2", "top_p_2"),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe_layer")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--tokens", type=int, help="instead of the preset's number of tokens")
    parser.add_argument("--choices", help="comma-separated, e.g. top_2,top_p_2")
    parser.add_argument(
        "--methods", help=f"comma-separated of {','.join((*JAX_METHODS, *TORCH_METHODS))}"
    )
    parser.add_argument("--directions", default=",".join(DIRECTIONS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the JAX peers; auto = bfloat16 on accelerators, float32 on CPU",
    )
    parser.add_argument(
        "--peer_tunables",
        default="",
        help="GLIBC_TUNABLES of PyTorch; glibc.malloc.hugetlb=1 gives it huge pages, as ours has",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure here")
    return parser.parse_args(argv)


def jax_cases(preset: Preset, chosen, methods, directions, dtype: str = "auto"):
    """``{"method/choice/direction": compiled layer}``, and what each choice uses."""
    from benchmarks import layer_jax

    arrays = layer_jax.on_device(draw(preset), dtype)
    parameters = layer_jax.moe_parameters(arrays)
    cases, used = {}, {}
    for choice in chosen:
        used[choice.name] = layer_jax.used_by(arrays, choice)
        hidden_width = round(used[choice.name].rows * preset.hidden_width / preset.tokens)
        for method in methods:
            if method == "dense":
                layer = layer_jax.dense_layer
                layer_parameters = layer_jax.dense_parameters(arrays, hidden_width)
            else:
                layer = layer_jax.moe_layer(choice, layer_jax.backend_of(method, choice))
                layer_parameters = parameters
            for direction in directions:
                cases[f"{method}/{choice.name}/{direction}"] = layer_jax.Compiled(
                    layer, layer_parameters, arrays, direction == "train"
                )
    return cases, used


def torch_worker(preset: Preset, chosen, methods, directions, threads: int, tunables: str):
    """The process that runs the PyTorch peers, or None if there are none to run."""
    from benchmarks.worker import Worker

    if not methods:
        return None
    request = {
        "preset": dataclasses.asdict(preset),
        "choices": [dataclasses.asdict(choice) for choice in chosen],
        "methods": methods,
        "directions": directions,
        "threads": threads,
    }
    return Worker.of_module("benchmarks.layer_torch", json.dumps(request), tunables=tunables)


def main(argv: list[str]) -> dict:
    """Measures, prints tables, writes the JSON and returns what it holds."""
    flags = parse(argv)
    installed = () if missing("bench") else TORCH_METHODS
    methods = flags.methods.split(",") if flags.methods else [*DEFAULT_METHODS, *installed]
    if not set(TORCH_METHODS).isdisjoint(methods):
        need("bench")
    pin_threads(flags.threads)
    import jax

    from benchmarks import layer_report
    from dynmoe_jax.experts.layer_cost import expert_weight_bytes
    from dynmoe_jax.hardware.chips import chip_of

    preset = PRESETS[flags.preset]
    if flags.tokens:
        preset = dataclasses.replace(preset, tokens=flags.tokens)
    available = choices(preset, draw(preset))
    names = flags.choices.split(",") if flags.choices else DEFAULT_CHOICES.get(flags.preset)
    chosen = [available[name] for name in names or available]
    directions = flags.directions.split(",")

    ours = [m for m in methods if m in JAX_METHODS]
    compiled, used = jax_cases(preset, chosen, ours, directions, flags.dtype)
    peers = [m for m in methods if m in TORCH_METHODS]
    worker = torch_worker(preset, chosen, peers, directions, flags.threads, flags.peer_tunables)
    cases = dict(compiled)
    if worker:
        cases |= {name: lambda name=name: worker.seconds(name) for name in worker.names}
    weight_bytes = expert_weight_bytes(preset.num_experts, preset.width, preset.hidden_width)
    cases["copy"] = Copy(weight_bytes, flags.threads)
    seconds = interleave(cases, flags.rounds, show_progress(flags.rounds), in_a_row=2)
    if worker:
        worker.close()

    chip = chip_of(jax.devices()[0].device_kind)
    report = layer_report.Report(preset, seconds, compiled, used, chip)
    print(report.tables())
    result = {
        "preset": flags.preset,
        "shape": dataclasses.asdict(preset),
        "used": {name: dataclasses.asdict(what) for name, what in used.items()},
        "records": report.records(),
        "marks": [dataclasses.asdict(mark) for mark in report.marks()],
        "seconds": {name: list(values) for name, values in seconds.items()},
    }
    return with_machine("benchmarks.moe_layer", result, flags.json)


if __name__ == "__main__":
    restart_with_huge_pages()
    run(lambda: main(sys.argv[1:]))
