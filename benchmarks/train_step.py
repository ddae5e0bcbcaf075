"""Whole training steps: dense, top-1, top-2 and top-p models of one shape, and Mixtral in PyTorch.

    python -m benchmarks.train_step --preset=cpu --json=train_step.json

Forward, backward, clipping and AdamW, on the same random tokens.  The top-p model's routers are
sharpened until its tokens use two experts on average.  With the extra ``bench``, Hugging Face's
Mixtral of the same shape, trained by PyTorch's fused AdamW, runs in a process of its own.
``--preset=paper`` is the paper's model of 3.5B parameters, for one accelerator of 80 GB.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.columns import columns
from benchmarks.command import missing, need, run
from benchmarks.machine import pin_threads, with_machine
from benchmarks.timing import Mark, Ratio, interleave, ratio, show_progress
from dynmoe_jax.hardware.huge_pages import restart_with_huge_pages

TORCH_METHODS = ("hf_grouped_mm", "hf_eager")
TORCH_TOP_K = 2
JAX_METHODS = ("dense", "top_1", "top_2", "top_p_2")
HEADINGS = (
    "model", "tokens/s", "over top_2 [quartiles]", "s", "experts", "MFU", "peak GB", "compile s",
)  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=("cpu", "paper", "tiny"), default="cpu")
    parser.add_argument(
        "--methods", help=f"comma-separated of {','.join((*JAX_METHODS, *TORCH_METHODS))}"
    )
    parser.add_argument("--batch_size", type=int, help="sequences per step")
    parser.add_argument("--microbatches", type=int, help="parts of a batch")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each model that count")
    parser.add_argument("--threads", type=int, default=2, help="cores for every model")
    parser.add_argument(
        "--peer_tunables",
        default="",
        help="GLIBC_TUNABLES of PyTorch; glibc.malloc.hugetlb=1 gives it huge pages, as ours has",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure here")
    return parser.parse_args(argv)


def torch_worker(preset, method: str, threads: int, tunables: str):
    """The process that trains Mixtral by one implementation of its experts."""
    from benchmarks.worker import Worker

    request = {
        "preset": dataclasses.asdict(preset),
        "method": method,
        "top_k": TORCH_TOP_K,
        "threads": threads,
    }
    return Worker.of_module("benchmarks.train_torch", json.dumps(request), tunables=tunables)


def records(seconds, jax_cases, peaks, peak_flops: float) -> list[dict]:
    """One dictionary for each model.

    Args:
      seconds: of each model in each round.
      jax_cases: this project's models by name.
      peaks: bytes of the PyTorch processes.
      peak_flops: FLOP/s that utilisation is measured against.
    """
    found = []
    for name, taken in seconds.items():
        # Mixtral of the same shape computes what top-2 computes.
        case = jax_cases.get(name) or jax_cases["top_2"]
        median = float(np.nanmedian(taken))
        record = {
            "model": name,
            "tokens_per_second": case.tokens / median,
            "seconds": median,
            "experts_per_token": case.experts_per_token,
            "mfu": case.flops / median / peak_flops,
            "peak_bytes": peaks.get(name, case.step_bytes),
        }
        if "top_2" in seconds:
            # Of rates: the times the other way round.
            record["rate_over_top_2"] = dataclasses.asdict(ratio(seconds["top_2"], taken))
        if name in jax_cases:
            record["compile_s"] = case.compile_s
        found.append(record)
    return found


def marks(seconds, mfu: dict[str, float], preset: str) -> list[Mark]:
    """The issue's marks that the models of a run decide."""
    found = []
    mixtrals = [name for name in TORCH_METHODS if name in seconds]
    if mixtrals and "top_2" in seconds:
        fastest = min(mixtrals, key=lambda name: float(np.nanmedian(seconds[name])))
        value = ratio(seconds[fastest], seconds["top_2"])
        found.append(Mark(f"tokens/s, top-2 / Mixtral ({fastest})", 1.3, value, at_least=True))
    if {"top_p_2", "top_2"} <= seconds.keys():
        value = ratio(seconds["top_2"], seconds["top_p_2"])
        found.append(Mark("tokens/s, top-p of mean 2 / top-2", 0.97, value, at_least=True))
    if preset == "paper" and "top_p_2" in mfu:
        value = Ratio(*[mfu["top_p_2"]] * 3)
        found.append(Mark("utilisation of the step, top-p of mean 2", 0.35, value, at_least=True))
    return found


def table(rows: list[dict]) -> str:
    """What a person reads."""
    return "\n".join(columns([HEADINGS, *map(_row, rows)]))


def _row(record: dict) -> tuple[str, ...]:
    over = record.get("rate_over_top_2")
    return (
        record["model"],
        f"{record['tokens_per_second']:,.0f}",
        str(Ratio(**over)) if over else "-",
        f"{record['seconds']:.2f}",
        f"{record['experts_per_token']:.2f}",
        f"{record['mfu']:.0%}",
        f"{record['peak_bytes'] / 1e9:.2f}" if record["peak_bytes"] else "-",
        f"{record['compile_s']:.1f}" if "compile_s" in record else "-",
    )


def main(argv: list[str]) -> dict:
    """Measures, prints table and marks, writes the JSON and returns what it holds."""
    flags = parse(argv)
    defaults = ["top_p_2"] if flags.preset == "paper" else list(JAX_METHODS)
    if flags.preset != "paper" and not missing("bench"):
        defaults += TORCH_METHODS
    methods = flags.methods.split(",") if flags.methods else defaults
    if not set(TORCH_METHODS).isdisjoint(methods):
        need("bench")
    pin_threads(flags.threads)
    from benchmarks.train_cases import PRESETS, cases
    from benchmarks.train_jax import TrainCase
    from dynmoe_jax.training.log.hardware import peak_flops_per_second

    overrides = {"batch_size": flags.batch_size, "microbatches": flags.microbatches}
    preset = dataclasses.replace(
        PRESETS[flags.preset], **{name: value for name, value in overrides.items() if value}
    )
    available = cases(preset)
    jax_cases = {m: TrainCase(preset, available[m]) for m in methods if m in JAX_METHODS}
    workers = {
        m: torch_worker(preset, m, flags.threads, flags.peer_tunables)
        for m in methods
        if m in TORCH_METHODS
    }
    runs = dict(jax_cases) | {m: lambda w=w, m=m: w.seconds(m) for m, w in workers.items()}
    seconds = interleave(runs, flags.rounds, show_progress(flags.rounds), in_a_row=2)
    peaks = {m: worker.seconds("peak_bytes") for m, worker in workers.items()}
    for worker in workers.values():
        worker.close()

    rows = records(seconds, jax_cases, peaks, peak_flops_per_second())
    found = marks(seconds, {row["model"]: row["mfu"] for row in rows}, flags.preset)
    print("\n".join([table(rows), "", "marks", *map(str, found)]))
    result = {
        "preset": flags.preset,
        "records": rows,
        "marks": [dataclasses.asdict(mark) for mark in found],
        "seconds": {name: list(values) for name, values in seconds.items()},
    }
    return with_machine("benchmarks.train_step", result, flags.json)


if __name__ == "__main__":
    restart_with_huge_pages()
    run(lambda: main(sys.argv[1:]))
