"""Colours of the report, its style sheet, and figures that follow the reader's light or dark mode.

Figures are drawn by matplotlib in the light colours, stored as SVG inside the page, and every
colour of the theme in them is replaced by a CSS variable, which has a second value in dark mode.
The categorical colours are those of Okabe and Ito, told apart by colour-blind readers too.
"""

import contextlib
import dataclasses
import io
import itertools
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# name -> (light, dark)
COLORS = {
    "page": ("#fbfbfa", "#16181c"),
    "card": ("#fefefe", "#1e2127"),
    "ink": ("#1f2328", "#e4e7eb"),
    "soft": ("#5f6873", "#9aa4b0"),
    "line": ("#dfe2e6", "#363b44"),
    "blue": ("#0072b2", "#4ba3dc"),
    "orange": ("#d07c00", "#f0a830"),
    "green": ("#009e73", "#2fc79b"),
    "red": ("#d55e00", "#ff8a45"),
    "purple": ("#b0588e", "#dc94bf"),
    "sky": ("#3f9fd8", "#7cc4f2"),
}
CYCLE = ("blue", "orange", "green", "purple", "red", "sky")
# Five steps from few experts to many, behind the tokens of the sample.
HEAT = (
    ("#e8f1f8", "#1d2c3a"),
    ("#c3ddf0", "#1f4560"),
    ("#f7e7b5", "#56501f"),
    ("#f8c88a", "#7a4d14"),
    ("#ee9b6c", "#a2431c"),
)


def light(name: str) -> str:
    """The colour that figures are drawn in."""
    return COLORS[name][0]


@dataclasses.dataclass(frozen=True)
class Picture:
    """One figure of the report with the words around it."""

    title: str
    caption: str
    svg: str


@dataclasses.dataclass
class Canvas:
    """Makes figures of one look and turns them into SVG for the page."""

    _numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def figure(self, rows: int = 1, height: float = 3.1):
        """A figure with ``rows`` axes above each other that share x."""
        from matplotlib.figure import Figure

        # 5.2 inches: at 420 pixels of screen the labels still have nine of them.
        figure = Figure(figsize=(5.2, height), layout="constrained")
        return figure, figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]

    def picture(self, figure: "Figure", title: str, caption: str) -> Picture:
        """The figure as a part of the page."""
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        number = next(self._numbers)
        target = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        # The salt makes the page the same, byte for byte, when it is drawn again.
        with matplotlib.rc_context({"svg.hashsalt": str(number)}), warnings.catch_warnings():
            # matplotlib's font lacks many scripts; the reader's browser has its own.
            warnings.filterwarnings("ignore", "Glyph .* missing")
            for part in (figure, *figure.axes):
                part.patch.set(facecolor="none", edgecolor="none")
            # figure.savefig would lay out and draw everything once before.
            FigureCanvasSVG(figure).print_svg(target, metadata=nothing)
        return Picture(title, caption, _inline(target.getvalue(), f"figure{number}-"))


def legend(figure: "Figure") -> None:
    """Names what is drawn, above the axes, where it can hide nothing."""
    (handles, labels) = figure.axes[0].get_legend_handles_labels()
    widths = [len(label) + 6 for label in labels]  # in letters; the width is about 72 of them
    columns = len(labels) if sum(widths) <= 72 else max(1, 72 // max(widths))
    shown = figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.4
    )
    for text in shown.get_texts():
        text.set_parse_math(False)  # a domain may have a dollar sign in its name


def integer_ticks(number: int):
    """Ticks at about ``number`` whole numbers, or at the only one there is."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(number, integer=True, min_n_ticks=1)


def figure_style() -> contextlib.AbstractContextManager:
    """Within it, everything that matplotlib makes has the look of the report."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


_STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib; the page puts its own font there
    "svg.fonttype": "none",
    "text.color": light("ink"),
    "axes.labelcolor": light("soft"),
    "axes.edgecolor": light("line"),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": light("line"),
    "grid.linewidth": 0.6,
    "xtick.color": light("line"),
    "ytick.color": light("line"),
    "xtick.labelcolor": light("soft"),
    "ytick.labelcolor": light("soft"),
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def _inline(svg: str, prefix: str) -> str:
    """The ``<svg>`` element alone, in theme colours, its ids unique within the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = svg.replace("url(#", f"url(#{prefix}")
    # The page scales the figure; its own size would stand in the way.
    svg = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    for name, (color, _) in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg


def style_sheet() -> str:
    """The CSS of the page."""
    names = [*COLORS, *(f"heat{step}" for step in range(len(HEAT)))]
    pairs = [*COLORS.values(), *HEAT]
    lights, darks = (
        "".join(f"--{name}:{pair[mode]};" for name, pair in zip(names, pairs, strict=True))
        for mode in (0, 1)
    )
    return _CSS.replace("LIGHT", lights).replace("DARK", darks)


_CSS = """
:root { color-scheme: light dark; LIGHT }
@media screen and (prefers-color-scheme: dark) { :root { DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .3rem; }
h3, figcaption b { font-size: 1rem; font-weight: 600; margin: 0; }
p { margin: .3rem 0; max-width: 75ch; }
.lead { max-width: none; }
.soft, .lead, figcaption span { color: var(--soft); }
code, pre { font: .86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.cards { display: grid; gap: .8rem; margin: 1.4rem 0;
  grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); }
.card, figure, .panel { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.card { padding: .8rem 1rem; }
.card b { display: block; font-size: 1.55rem; line-height: 1.25; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.card span { display: block; font-size: .85rem; color: var(--soft); line-height: 1.35; }
.warning { border: 1px solid var(--red); border-left-width: 5px; border-radius: 6px;
  padding: .6rem 1rem; margin: 1rem 0; }
.grid { display: grid; gap: 1rem; margin-top: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(min(430px, 100%), 1fr)); }
figure { margin: 0; padding: 1rem 1rem .9rem; display: flex; flex-direction: column; }
figure svg { width: 100%; height: auto; display: block; margin: .5rem 0 .6rem; }
figure svg text { font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  sans-serif !important; }
figcaption span { display: block; font-size: .88rem; line-height: 1.45; }
.scroll { overflow-x: auto; margin-top: .9rem; }
.command { padding: .8rem 1rem; }
.settings td:first-child { min-width: 10em; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .4rem .8rem; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; min-width: 4.5em; }
th:first-child, td:first-child { min-width: 7em; }
tr:last-child td { border-bottom: 0; }
.number, td.number { min-width: 0; text-align: right; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
td.number, td.word { white-space: nowrap; }
th { color: var(--soft); font-weight: 500; vertical-align: bottom; overflow-wrap: normal; }
tr.total td { font-weight: 650; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; padding: 1rem 1.2rem; margin: .9rem 0 0;
  line-height: 1.75; }
.sample i { font-style: normal; border-radius: 3px; padding: .1em 0; }
.key i { font-style: normal; padding: .1em .55em; margin-right: .2rem; border-radius: 3px; }
.heat0 { background: var(--heat0); } .heat1 { background: var(--heat1); }
.heat2 { background: var(--heat2); } .heat3 { background: var(--heat3); }
.heat4 { background: var(--heat4); }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--soft); }
@media (max-width: 560px) { main { padding: 1.2rem .7rem 3rem; } figure { padding: .8rem .6rem; }
  .cards { grid-template-columns: 1fr 1fr; gap: .5rem; } .card { padding: .6rem .7rem; }
  .card b { font-size: 1.25rem; } th, td { padding: .4rem .45rem; } }
@media print { html { font-size: 11px; } body { font-size: 1rem; background: none; }
  main { max-width: none; padding: 0; }
  .grid { grid-template-columns: 1fr 1fr; } figure, .card, tr { break-inside: avoid; }
  h2 { break-after: avoid; } * { print-color-adjust: exact; } }
"""
