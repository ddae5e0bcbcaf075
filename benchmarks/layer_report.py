"""Tables and marks of `benchmarks.moe_layer`."""

import dataclasses

import numpy as np

from benchmarks.columns import columns
from benchmarks.layer_cases import Preset, Used
from benchmarks.layer_marks import marks
from benchmarks.timing import Mark, ratio
from dynmoe_jax.experts.layer_cost import layer_cost, layer_peak_bytes
from dynmoe_jax.hardware.chips import Chip

HEADINGS = (
    "method", "ours / method [quartiles]", "ms", "GFLOP/s", "of dense", "of roofline", "temp MB",
    "compile s",
)  # fmt: skip


class Report:
    """Everything measured in one run.

    Args:
      preset: the shape.
      seconds: of each ``method/choice/direction``, and of ``copy``.
      compiled: the JAX cases, which know their memory and compile time.
      used: of each choice.
      chip: what it ran on, if its data sheet is known.
    """

    def __init__(
        self,
        preset: Preset,
        seconds: dict,
        compiled: dict,
        used: dict[str, Used],
        chip: Chip | None = None,
    ):
        self.preset, self.seconds, self.compiled, self.used = preset, seconds, compiled, used
        self.chip = chip

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
        used, shape = self.used[choice], (self.preset.width, self.preset.hidden_width)
        cost = layer_cost(used.rows, used.experts, *shape, backward=direction == "train")
        record = {
            "method": method,
            "choice": choice,
            "direction": direction,
            "seconds": seconds,
            "useful_gflops_per_s": cost.flops / seconds / 1e9,
            "flops_per_byte": cost.intensity,
        }
        for key, over, under in (
            ("ours_over_this", "ours", method),
            ("dense_over_this", "dense", method),
        ):
            over, under = f"{over}/{choice}/{direction}", f"{under}/{choice}/{direction}"
            if over in self.seconds:
                record[key] = dataclasses.asdict(ratio(self.seconds[over], self.seconds[under]))
        if self.chip:
            record["of_roofline"] = cost.roofline_s(self.chip) / seconds
        if name in self.compiled:
            record["temp_bytes"] = self.compiled[name].temp_bytes
            record["analytic_peak_bytes"] = layer_peak_bytes(
                self.preset.tokens,
                used.rows,
                self.preset.num_experts,
                *shape,
                backward=direction == "train",
                itemsize=self.compiled[name].arguments[0].dtype.itemsize,
            )
            record["compile_s"] = self.compiled[name].compile_s
        return record

    def _table(self, group: tuple[str, str], records: list[dict]) -> str:
        choice, direction = group
        mean = self.used[choice].rows / self.preset.tokens
        title = f"{choice} (mean {mean:.2f} experts per token), {direction}"
        return "\n".join([title, *columns([HEADINGS, *map(_row, records)])])


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
        f"{record['of_roofline']:.0%}" if "of_roofline" in record else "-",
        f"{temp / 1e6:.1f}" if temp is not None else "-",
        f"{record['compile_s']:.1f}" if "compile_s" in record else "-",
    )
