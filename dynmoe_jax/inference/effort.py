"""Experts behind each token, shown as colours or as numbers: which words were hard.

The shade is the number of experts that the token used, mean over the MoE layers, in five steps from
the fewest to the most in the texts shown.
"""

import dataclasses
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from dynmoe_jax.inference.writer import Written
from dynmoe_jax.runs.formatting import printable

SHADES = ("black on #d7e9f7", "black on #9fcbec", "black on #f7e7b5", "black on #f3b562",
          "white on #b8421c")  # fmt: skip
"""From few experts to many."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """Range of the experts used, from the fewest to the most."""

    low: float
    high: float

    @classmethod
    def of(cls, texts: Sequence[Written]) -> "Scale | None":
        """Scale of all tokens; None if they used no experts."""
        counts = [count for written in texts for count in written.experts_n]
        return cls(min(counts), max(counts)) if counts else None

    def step(self, count: float) -> int:
        """Index of a count's shade in ``SHADES``."""
        share = (count - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return min(int(share * len(SHADES)), len(SHADES) - 1)

    def edges(self) -> list[float]:
        """Edges of the shades, from the lowest to the highest."""
        width = (self.high - self.low) / len(SHADES)
        return [self.low + i * width for i in range(len(SHADES) + 1)]


def print_effort(console: Console, written: Written, scale: Scale) -> None:
    """Prints prompt and text: in colours, or with numbers below where there are none."""
    if console.color_system is None:
        for line in numbered(written, console.width):
            console.print(line, markup=False, soft_wrap=True)
    else:
        console.print(coloured(written, scale), soft_wrap=True)


def legend(console: Console, scale: Scale) -> Text:
    """Legend of the shades, or of the numbers."""
    if console.color_system is None:
        return Text("Below each token: the experts that it used, mean over layers.")
    edges = scale.edges()
    if scale.high == scale.low:
        return Text(f"Every token used {scale.low:.2f} experts, mean over layers.")
    text = Text("Experts that a token used, mean over layers: ")
    for style, low, high in zip(SHADES, edges, edges[1:], strict=False):
        text.append(f" {low:.2f}–{high:.2f} ", style=style)
    return text


def coloured(written: Written, scale: Scale) -> Text:
    """The prompt in bold, then each token in the shade of its experts."""
    text = Text(printable(written.prompt), style="bold")
    for piece, count in zip(written.pieces, written.experts_n, strict=True):
        text.append(printable(piece), style=f"not bold {SHADES[scale.step(count)]}")
    return text


def numbered(written: Written, width: int) -> list[str]:
    """The text in lines, and below each its tokens' experts; a blank line between prompt and text.

    Args:
      written: the text.
      width: of a line, in cells.
    """
    lines, above, below = [printable(written.prompt), ""], "", ""

    def flush():
        nonlocal above, below
        lines.extend([above.rstrip(), below.rstrip()])
        above = below = ""

    for piece, count in zip(written.pieces, written.experts_n, strict=True):
        shown = printable(piece).replace("\n", "⏎").replace("\t", "⇥")
        number = f"{count:.1f}"
        cell = max(cell_len(shown), len(number)) + 1
        if above and cell_len(above) + cell > width:
            flush()
        above += shown + " " * (cell - cell_len(shown))
        below += f"{number:<{cell}}"
        if "\n" in piece:
            flush()
    if above:
        flush()
    return lines
