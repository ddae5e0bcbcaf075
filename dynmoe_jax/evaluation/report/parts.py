"""Parts of a page: escaped text, tables, figures, text coloured by the experts that it used."""

import html
import math
from collections.abc import Iterable, Sequence

from dynmoe_jax.evaluation.report.theme import HEAT, Picture, style_sheet
from dynmoe_jax.runs.formatting import decimals, printable


def page(title: str, body: Iterable[str]) -> str:
    """A whole HTML page that needs nothing but itself."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n"
        f"<style>{style_sheet()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def escaped(text: object) -> str:
    """Text that is safe anywhere in the page."""
    return html.escape(printable(str(text)))


def section(title: str, pictures: Iterable[Picture | None]) -> str:
    """A heading and its figures; nothing where there are none."""
    figures = figures_of(pictures)
    return f"<h2>{escaped(title)}</h2>{figures}" if figures else ""


def figures_of(pictures: Iterable[Picture | None]) -> str:
    """Figures side by side; nothing where there are none."""
    figures = "".join(
        f"<figure><figcaption><b>{escaped(picture.title)}</b></figcaption>"
        f'<div role="img" aria-label="{escaped(picture.title)}">{picture.svg}</div>'
        f"<figcaption><span>{escaped(picture.caption)}</span></figcaption></figure>"
        for picture in pictures
        if picture
    )
    return f'<div class="grid">{figures}</div>' if figures else ""


_SHORT = 8
"""Letters of a word that stays whole, however narrow a screen is."""


def table_of(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    numbers: Sequence[int] = (),
    total: Sequence[object] = (),
) -> str:
    """A table; the columns in ``numbers`` are aligned right, a ``total`` closes it."""

    def row(cells: Sequence[object], tag: str) -> str:
        def kind(i: int, cell: object) -> str:
            if i in numbers:
                return ' class="number"'
            return ' class="word"' if len(str(cell)) <= _SHORT else ""

        return "".join(f"<{tag}{kind(i, c)}>{escaped(c)}</{tag}>" for i, c in enumerate(cells))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    body += f'<tr class="total">{row(total, "td")}</tr>' if total else ""
    head = f"<thead><tr>{row(header, 'th')}</tr></thead>"
    return f'<div class="panel scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def coloured(pieces: Sequence[tuple[str, float]]) -> tuple[str, str]:
    """Text by the experts that each piece used, and the key to its colours.

    Args:
      pieces: (text, mean experts over the layers; NaN where it is not known).

    Returns:
      (text, key), as HTML; both without colours where no number is known.
    """
    counts = [experts for _, experts in pieces if math.isfinite(experts)]
    if not counts:
        return "".join(escaped(piece) for piece, _ in pieces), ""
    low, high = min(counts), max(counts)
    shades = "".join(f'<i class="heat{step}">&nbsp;</i>' for step in range(len(HEAT)))
    key = (
        f'<p class="soft key">Colour: experts that a token used, mean over layers, from '
        f"{decimals(low, 1)} {shades} to {decimals(high, 1)}.</p>"
    )
    return "".join(_piece(piece, experts, low, high) for piece, experts in pieces), key


def _piece(text: str, experts: float, low: float, high: float) -> str:
    if not math.isfinite(experts):
        return escaped(text)
    step = int((experts - low) / (high - low) * (len(HEAT) - 1) + 0.5) if high > low else 0
    return f'<i class="heat{step}" title="{decimals(experts, 2)} experts">{escaped(text)}</i>'
