"""Tables and marks of `benchmarks.moe_layer`."""

import dataclasses
import sys
from collections.abc import Callable

import numpy as np

from benchmarks.layer_cases import Preset, Used
from benchmarks.layer_marks import Mark, marks
from benchmarks.timing import ratio
from dynmoe_jax.experts.accounting import expert_flops

TRAIN_FLOPS = 3
"""Forward + backward over forward: two more products of the same size for each one."""

HEADINGS = (
    "method", "ours / method [quartiles]", "ms", "GFLOP/s", "of dense", "temp MB", "compile s",
)  # fmt: skip


class Report:
    """Everything measured in one run.

    Args:
      preset: the shape.
      seconds: of each ``method/choice/direction``, and of ``copy``.
      compiled: the JAX cases, which know their memory and compile time.
      used: of each choice.
    """

    def __init__(self, preset: Preset, seconds: dict, compiled: dict, used: dict[str, Used]):
        self.preset, self.seconds, self.compiled, self.used = preset, seconds, compiled, used

    def records(self) -> list[dict]:
        """One dictionary for each case."""
        return [self._record(name) for name in self.seconds if name != "copy"]

    def marks(self) -> list[Mark]:
        """The issue's marks that this run's cases decide."""
        temp = {name: case.temp_bytes for name, case in self.compiled.items()}
        return marks(self.preset, self.seconds, temp, self.used)

    def tables(self) -> str:
        """One table for each choice and direction, then the marks."""
        records = self.records()
        groups = dict.fromkeys((r["choice"], r["direction"]) for r in records)
        blocks = [
            self._table(group, [r for r in records if (r["choice"], r["direction"]) == group])
            for group in groups
        ]
        return "\n\n".join([*blocks, "\n".join(["marks", *map(str, self.marks())])])

    def _record(self, name: str) -> dict:
        method, choice, direction = name.split("/")
        seconds = float(np.nanmedian(self.seconds[name]))
        flops = expert_flops(self.used[choice].rows, self.preset.width, self.preset.hidden_width)
        flops *= TRAIN_FLOPS if direction == "train" else 1
        record = {
            "method": method,
            "choice": choice,
            "direction": direction,
            "seconds": seconds,
            "useful_gflops_per_s": flops / seconds / 1e9,
        }
        for key, over, under in (
            ("ours_over_this", "ours", method),
            ("dense_over_this", "dense", method),
        ):
            over, under = f"{over}/{choice}/{direction}", f"{under}/{choice}/{direction}"
            if over in self.seconds:
                record[key] = dataclasses.asdict(ratio(self.seconds[over], self.seconds[under]))
        if name in self.compiled:
            record["temp_bytes"] = self.compiled[name].temp_bytes
            record["compile_s"] = self.compiled[name].compile_s
        return record

    def _table(self, group: tuple[str, str], records: list[dict]) -> str:
        choice, direction = group
        mean = self.used[choice].rows / self.preset.tokens
        title = f"{choice} (mean {mean:.2f} experts per token), {direction}"
        return "\n".join([title, *_columns([HEADINGS, *map(_row, records)])])


def _row(record: dict) -> tuple[str, ...]:
    def spread(key):
        if key not in record:
            return "-"
        return "{median:.2f} [{low:.2f}, {high:.2f}]".format(**record[key])

    dense = record.get("dense_over_this")
    temp = record.get("temp_bytes")
    return (
        record["method"],
        spread("ours_over_this"),
        f"{1e3 * record['seconds']:.1f}",
        f"{record['useful_gflops_per_s']:.1f}",
        f"{dense['median']:.0%}" if dense else "-",
        f"{temp / 1e6:.1f}" if temp is not None else "-",
        f"{record['compile_s']:.1f}" if "compile_s" in record else "-",
    )


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def show_progress(rounds: int) -> Callable[[int], None]:
    """Tells on stderr how far the rounds are."""

    def show(done: int) -> None:
        print(f"\rround {done} of {rounds}", end="\n" if done == rounds else "", file=sys.stderr)

    return show
