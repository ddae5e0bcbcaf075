"""All routers trained alike: quality against compute, as a table and a picture.

    python -m benchmarks.routers --data='jsonl:corpus/*.jsonl.zst' --out=runs/routers

Every case is ``configs/quickstart.py`` with another router, its settings such that tokens use two
experts on average (`benchmarks.router_cases`), trained on the same tokens in the same order from
the same seed.  Each is an ordinary run in a folder of its own, so that the command can be stopped
and continued, or given more seeds or cases later.  Writes ``routers.json``, ``routers.md`` and
``routers.png``.

FLOPs are those of the experts really used, forward, for a held-out token; seconds of a step are the
medians of runs that followed each other, for orientation (`benchmarks.router_cost` compares steps
in turns).
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.command import run
from benchmarks.machine import with_machine
from benchmarks.router_cases import CASES, SEVERAL_SEEDS, flags_of
from dynmoe_jax.config import ConfigError
from dynmoe_jax.model.flops import forward_flops
from dynmoe_jax.runs.begun import saved_config
from dynmoe_jax.runs.formatting import duration
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.runs.summary import read_summary

HEADINGS = (
    "router", "seeds", "held-out bits per byte", "experts per token", "MFLOPs per token",
    "step over top_2", "dropped", "unused",
)  # fmt: skip


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", default="python", help="config.data.sources of all runs")
    parser.add_argument("--out", type=Path, default=Path("runs/routers"), help="folder of all runs")
    parser.add_argument("--steps", type=int, default=600, help="of each run")
    parser.add_argument("--megabytes", type=float, default=8.0, help="of text, at most")
    parser.add_argument("--seeds", type=int, default=3, help=f"of {', '.join(SEVERAL_SEEDS)}")
    parser.add_argument("--cases", default=",".join(CASES), help="with commas between them")
    return parser.parse_args(argv)


def planned(names: Sequence[str], seeds: int) -> list[tuple[str, int]]:
    """(case, seed) of every run: first all cases once.

    Raises:
      ConfigError: a name is none of a case.
    """
    for name in names:
        if name not in CASES:
            raise ConfigError(f"--cases={name} must be one of {', '.join(CASES)}.")
    more = [name for name in names if name in SEVERAL_SEEDS]
    return [(n, 0) for n in names] + [(n, seed) for seed in range(1, seeds) for n in more]


def train(name: str, seed: int, asked: argparse.Namespace) -> Path:
    """Trains a case, or goes on with it; the folder of its run.

    Raises:
      ConfigError: the run has failed.
    """
    workdir = asked.out / name / str(seed)
    if read_summary(workdir):
        return workdir
    workdir.mkdir(parents=True, exist_ok=True)
    prepared = asked.out / "data"
    arguments = [
        "train.py",
        "--config=configs/quickstart.py",
        f"--workdir={workdir}",
        *flags_of(name),
        f"--config.seed={seed}",
        f"--config.train.steps={asked.steps}",
        f"--config.data.sources={asked.data}",
        f"--config.data.max_megabytes={asked.megabytes}",
        f"--config.data.directory={prepared}",
        f"--config.train.compilation_cache={asked.out / 'compiled'}",
        "--config.evaluation.sample_tokens=8",
    ]
    tokenizer = asked.out / "tokenizer.model"
    if tokenizer.exists():
        arguments.append(f"--config.data.tokenizer={tokenizer}")
    log = workdir / "log.txt"
    with log.open("w") as file:
        done = subprocess.run([sys.executable, *arguments], stdout=file, stderr=file, check=False)
    if done.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise ConfigError(f"{name} with seed {seed} has failed: {' '.join(last)} (see {log}).")
    if not tokenizer.exists():
        tokenizer.write_bytes((workdir / "tokenizer.model").read_bytes())
    return workdir


def result(workdir: Path) -> dict:
    """The figures of one run."""
    summary, metrics, cfg = read_summary(workdir), read_metrics(workdir), saved_config(workdir)
    layers = cfg.model.num_moe_layers
    experts = summary.heldout.experts_per_token if layers else 0.0
    last = metrics[len(metrics) // 2 :]
    routed = max(1, sum(line["experts_per_token"] for line in last))
    tokens = cfg.train.batch_size * cfg.data.seq_len
    return {
        "bits_per_byte": summary.heldout.bits_per_byte,
        "experts_per_token": experts,
        "flops_per_token": forward_flops(cfg.model, 1, cfg.data.seq_len, experts * layers),
        "seconds_step": float(np.median([line["seconds_step"] for line in last])),
        "dropped": sum(line["rows_dropped"] for line in last) / (routed * tokens * max(layers, 1)),
        "unused": float(np.mean([line["unused_experts"] for line in last])),
    }


def rows(results: dict[str, list[dict]]) -> list[dict]:
    """One record for each case: means over seeds, and the spread of what is compared."""
    found = []
    for name, runs in results.items():
        mean = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
        bits = [run["bits_per_byte"] for run in runs]
        spread = float(np.std(bits, ddof=1)) if len(bits) > 1 else float("nan")
        found.append({"name": name, "seeds": len(runs), **mean, "bits_per_byte_std": spread})
    return found


def table(found: list[dict]) -> list[str]:
    """Lines of a Markdown table."""
    base = next((row["seconds_step"] for row in found if row["name"] == "top_2"), float("nan"))
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    for row in sorted(found, key=lambda row: row["bits_per_byte"]):
        spread = f" ± {row['bits_per_byte_std']:.4f}" if row["seeds"] > 1 else ""
        cells = (
            f"`{row['name']}`",
            str(row["seeds"]),
            f"{row['bits_per_byte']:.4f}{spread}",
            f"{row['experts_per_token']:.2f}",
            f"{row['flops_per_token'] / 1e6:.2f}",
            f"{row['seconds_step'] / base:.2f}",
            f"{100 * row['dropped']:.1f}%",
            f"{row['unused']:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(found: list[dict], path: Path) -> None:
    """Draws held-out bits per byte against FLOPs, names in a column beside the points."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 7), layout="constrained")
    points = sorted((row["bits_per_byte"], row["flops_per_token"] / 1e6, row) for row in found)
    for y, x, row in points:
        bar = row["bits_per_byte_std"] if row["seeds"] > 1 else None
        axis.errorbar(x, y, yerr=bar, fmt="o", markersize=5, capsize=3)
    heights = apart([y for y, _, _ in points], (points[-1][0] - points[0][0]) / 24)
    right = max(x for _, x, _ in points) * 1.12
    for (y, x, row), height in zip(points, heights, strict=True):
        axis.annotate(
            row["name"],
            (x, y),
            xytext=(right, height),
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.8", "linewidth": 0.6, "shrinkB": 4},
        )
    axis.set(xlabel="MFLOPs per held-out token (forward)", ylabel="held-out bits per byte")
    axis.set_xlim(right=right * 1.3)
    low, high = min(heights[0], points[0][0]), max(heights[-1], points[-1][0])
    axis.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def apart(values: Sequence[float], least: float) -> list[float]:
    """Ascending values moved so that neighbours are so far apart, around the same mean."""
    found = list(values)
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + least)
    shift = float(np.mean(found) - np.mean(values))
    return [value - shift for value in found]


def main(argv: Sequence[str]) -> None:
    """Trains what is not trained yet, and writes the comparison."""
    asked = parse(argv)
    plan = planned(asked.cases.split(","), asked.seeds)
    results: dict[str, list[dict]] = {}
    begin = time.perf_counter()
    for number, (name, seed) in enumerate(plan, 1):
        results.setdefault(name, []).append(result(train(name, seed, asked)))
        taken = time.perf_counter() - begin
        left = duration(taken / number * (len(plan) - number))
        bits = results[name][-1]["bits_per_byte"]
        print(f"{number} of {len(plan)}: {name}, seed {seed}: {bits:.4f}; {left} left", flush=True)
        found = rows(results)
        figures = {"steps": asked.steps, "data": asked.data, "routers": found}
        with_machine("benchmarks.routers", figures, asked.out / "routers.json")
        (asked.out / "routers.md").write_text("\n".join(table(found)) + "\n", encoding="utf-8")
    draw(found, asked.out / "routers.png")
    print((asked.out / "routers.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
