"""The page of a result: one HTML file that needs nothing but itself, drawn from its record."""

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynmoe_jax.evaluation.report.parts import (
    coloured,
    escaped,
    figures_of,
    page,
    section,
    table_of,
)
from dynmoe_jax.evaluation.report.theme import Canvas, figure_style
from dynmoe_jax.runs.formatting import MISSING, compact, decimals, duration, percent
from dynmoe_jax.runs.records import write_atomically
from dynmoe_jax.surgery.operation import OPERATIONS
from dynmoe_jax.surgery.report.command import command_of, settings_told, text_of
from dynmoe_jax.surgery.report.figures import choices_picture, domain_pictures, layer_pictures
from dynmoe_jax.surgery.report.starving import (
    STARVING,
    Given,
    calibrated_by_expert,
    tokens_by_expert,
)

FILE_NAME = "surgery.html"
_MOST_NAMED = 12


def write_page(folder: Path, record: Mapping[str, Any]) -> Path:
    """Writes ``surgery.html`` into the folder of a result; returns its path."""
    canvas, title = Canvas(), _title(record)
    with figure_style():
        domains, layers = domain_pictures(record, canvas), layer_pictures(record, canvas)
    body = [
        f"<h1>{escaped(title)}</h1>",
        _lead(record),
        "".join(f'<p class="warning">{escaped(remark)}</p>' for remark in record["remarks"]),
        _cards(record),
        _before_and_after(record),
        section("Held-out text by domain", domains),
        _domains(record),
        section("Layers", layers),
        _tokens(record),
        _calibration(record["calibration"]),
        _found(record, canvas),
        _samples(record["samples"]),
        _done(record),
        _history(record),
        _versions(record),
    ]
    path = folder / FILE_NAME
    write_atomically(path, page(f"{title} – surgery", body))
    return path


def _title(record: Mapping[str, Any]) -> str:
    names = [Path(parent["folder"]).name for parent in record["parents"]]
    return f"{record['operation']} of {', '.join(names)}"


def _lead(record: Mapping[str, Any]) -> str:
    """Says what the operation does, where it comes from, and whether it kept its promise."""
    kind = OPERATIONS.get(record["operation"])
    about = f"{inspect.getdoc(kind).splitlines()[0]} " if kind else ""
    paper = f"({kind.paper}.) " if kind and kind.paper else ""
    exact = record["exact"]
    largest = f"the largest difference of two logits is {exact['measured']:.2g} of the largest"
    if _promised(record):
        said = f"It promises to keep the function: {largest}, and {exact['promised']:g} is allowed."
    else:
        said = f"It does not promise to keep the function: {largest}."
    return f'<p class="lead">{escaped(about + paper + said)}</p>'


def _promised(record: Mapping[str, Any]) -> bool:
    promised = record["exact"]["promised"]
    return promised is not None and math.isfinite(promised)


def _cards(record: Mapping[str, Any]) -> str:
    before, after, compared = record["before"], record["after"], record["compared"]["all"]
    cards = [
        (compact(after["parameters"]), f"parameters, from {compact(before['parameters'])}"),
        (
            compact(after["active_parameters"]),
            f"active for a token, from {compact(before['active_parameters'])}",
        ),
        (_megabytes(after["file_bytes"]), f"on disk, from {_megabytes(before['file_bytes'])}"),
        (
            decimals(after["heldout_bits_per_byte"], 3),
            f"bits per byte, from {decimals(before['heldout_bits_per_byte'], 3)}",
        ),
        (percent(compared["agreement"]), "of tokens: the same one most probable"),
        (f"{record['exact']['measured']:.2g}", "largest difference of logits / largest logit"),
    ]
    shown = "".join(
        f'<div class="card"><b>{escaped(a)}</b><span>{escaped(b)}</span></div>' for a, b in cards
    )
    return f'<div class="cards">{shown}</div>'


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────


def _before_and_after(record: Mapping[str, Any]) -> str:
    sides = [record["before"], record["after"]]
    rows = [
        [name, *(shown(side[key]) for side in sides), _ratio(*(side[key] for side in sides))]
        for name, key, shown in (
            ("parameters", "parameters", "{:,}".format),
            ("active parameters of a token", "active_parameters", lambda x: f"{x:,.0f}"),
            ("bytes by arithmetic", "stored_bytes", "{:,}".format),
            ("bytes of the files", "file_bytes", "{:,}".format),
            ("FLOPs of a token, forward", "flops_per_token", compact),
            ("keys and values of a token, bytes", "kv_bytes_per_token", "{:,}".format),
            ("held-out loss, nats per token", "heldout_loss", lambda x: decimals(x, 4)),
            ("held-out bits per byte", "heldout_bits_per_byte", lambda x: decimals(x, 4)),
            ("experts per token", "experts_per_token", lambda x: decimals(x, 3)),
        )
    ]
    table = table_of(["", "before", "after", "ratio"], rows, (1, 2, 3))
    said = f"{_on_files(record)}{_routers(record)}"
    return f'<h2>Before and after</h2>{table}<p class="soft">{escaped(said)}</p>'


def _ratio(before: float, after: float) -> str:
    known = before and math.isfinite(before) and math.isfinite(after)
    return decimals(after / before, 3) if known else MISSING


def _on_files(record: Mapping[str, Any]) -> str:
    """Says what the two counts of bytes are of."""
    first, several = record["parents"][0], len(record["parents"]) > 1
    words = {True: "with", False: "without"}
    return (
        f"Before is {'the first parent' if several else 'the parent'}. Arithmetic counts "
        "parameters and router states, of a parent in float32. Files hold the optimizer's moments "
        f"too where there are any: before {words[bool(first['moments'])]}, after "
        f"{words[record['moments'] == 'carried']} them."
    )


def _routers(record: Mapping[str, Any]) -> str:
    """Routers of both sides; nothing where neither has any."""
    sides = {side: "; ".join(record[side]["routers"]) for side in ("before", "after")}
    if not any(sides.values()):
        return ""
    return " Routers: " + ", ".join(f"{side} {own or 'none'}" for side, own in sides.items()) + "."


def _domains(record: Mapping[str, Any]) -> str:
    compared = record["compared"]
    header = ["domain", "tokens", "loss before", "after", "bits per byte before", "after", "KL",
              "same top-1"]  # fmt: skip
    parts = {**compared["domains"], "all": compared["all"]}
    *rows, total = (
        [
            name,
            f"{part['tokens']:,}",
            *(decimals(part[f"loss_{side}"], 3) for side in ("before", "after")),
            *(decimals(part[f"bits_{side}"], 3) for side in ("before", "after")),
            f"{part['kl']:.2g}",
            percent(part["agreement"]),
        ]
        for name, part in parts.items()
    )
    data = escaped(f"Held-out documents of {record['data']['sources']}. KL is KL(before || after).")
    table = table_of(header, rows, range(1, len(header)), total)
    return f'{table}<p class="soft">{data}</p>'


def _tokens(record: Mapping[str, Any]) -> str:
    """Tokens that the experts of the result were given, with those that starve named."""
    measured = record["compared"]["all"]["tokens"]
    layers = tokens_by_expert(record["after"], measured)
    if not layers:
        return ""
    said = (
        f"Of {measured:,} held-out tokens. {_starving(layers)}: such an expert learns little, and "
        "what is measured of it rests on few tokens."
    )
    table = _by_expert(layers)
    return f'<h2>Tokens by expert</h2>{table}<p class="soft">{escaped(said)}</p>'


def _calibration(found: Mapping[str, Any]) -> str:
    """Statistics of training text, and experts of which there is too little."""
    if not found:
        return ""
    clusters = len(found["tokens"])
    said = (
        f"Gathered of {sum(found['tokens']):,} tokens of training text"
        f"{f' in {clusters} clusters' * (clusters > 1)}: {', '.join(found['statistics'])}."
    )
    layers, table = calibrated_by_expert(found), ""
    if layers:
        said += f" {_starving(layers)}: statistics of such an expert rest on few tokens."
        table = _by_expert(layers)
    return f'<h2>Calibration</h2>{table}<p class="soft">{escaped(said)}</p>'


def _by_expert(layers: Sequence[Given]) -> str:
    """A table of layers, with the experts that starve."""
    rows = [
        [
            own.layer,
            f"{own.even:,.0f}",
            *(f"{own.tokens[e]:,} (expert {e})" for e in (own.fewest, own.most)),
            _numbers(own.starving),
        ]
        for own in layers
    ]
    header = ["layer", "even share", "fewest tokens", "most tokens", "experts that starve"]
    return table_of(header, rows, (0, 1, 2, 3))


def _starving(layers: Sequence[Given]) -> str:
    """How many of the experts starve, without the end of the sentence."""
    starving, experts = (
        sum(len(of(own)) for own in layers) for of in (lambda x: x.starving, lambda x: x.tokens)
    )
    share = percent(STARVING, 0)
    return f"{starving or 'None'} of {experts} experts got less than {share} of an even share"


def _numbers(experts: Sequence[int]) -> str:
    """Numbers of experts, the first of them where they are many."""
    shown = ", ".join(map(str, experts[:_MOST_NAMED]))
    more = len(experts) - _MOST_NAMED
    return f"{shown} and {more} more" if more > 0 else shown or MISSING


def _found(record: Mapping[str, Any], canvas: Canvas) -> str:
    """Findings of the operation about each layer."""
    found, kind = record["found"], OPERATIONS.get(record["operation"])
    if not found:
        return ""
    names = list(dict.fromkeys(name for own in found.values() for name in own))
    rows = [
        [layer, *(f"{own[name]:.4g}" if name in own else MISSING for name in names)]
        for layer, own in found.items()
    ]
    table = table_of(["layer", *names], rows, range(1, 1 + len(names)))
    if not kind:
        return f"<h2>Found in layers</h2>{table}"
    with figure_style():
        figures = figures_of([choices_picture(found, kind.choices, canvas)])
    title = "Choices beside controls" if figures else "Found in layers"
    return f'<h2>{title}</h2>{figures}{table}<p class="soft">{escaped(kind.found)}</p>'


# ── Samples ──────────────────────────────────────────────────────────────────────────────────────


def _samples(samples: Mapping[str, Any]) -> str:
    if samples["left_out"]:
        return f'<h2>Samples</h2><p class="soft">{escaped(samples["left_out"])}</p>'
    same = sum(text["before"]["text"] == text["after"]["text"] for text in samples["texts"])
    said = (
        "Beginnings of held-out documents in bold, and what each model writes, greedily. "
        f"{same} of {len(samples['texts'])} are the same before and after."
    )
    shown = "".join(
        f'<div class="grid">{"".join(_sample(side, text) for side in ("before", "after"))}</div>'
        for text in samples["texts"]
    )
    return f'<h2>Samples</h2><p class="soft">{escaped(said)}</p>{shown}'


def _sample(side: str, text: Mapping[str, Any]) -> str:
    pieces = [(piece, count) for piece, count in text[side]["pieces"]]
    if len({count for _, count in pieces}) > 1:
        written, key = coloured(pieces)
    else:
        written, key = escaped(text[side]["text"]), ""
    return (
        f"<div><h3>{side}</h3>{key}"
        f'<div class="panel sample"><b>{escaped(text["prompt"])}</b>{written}</div></div>'
    )


# ── How it was made ──────────────────────────────────────────────────────────────────────────────


def _done(record: Mapping[str, Any]) -> str:
    settings = [
        [_setting(name, value), help + _default(default) * (value != default and bool(help))]
        for name, value, default, help in settings_told(record)
    ]
    parents = [
        [parent["folder"], _megabytes(parent["file_bytes"]), parent["digest"]]
        for parent in record["parents"]
    ]
    parents.append(["the result", _megabytes(record["after"]["file_bytes"]), record["digest"]])
    return (
        "<h2>What was done</h2>"
        f'<p class="soft">This makes the result again, in {escaped(duration(record["seconds"]))} '
        f"as it did here.</p>"
        f'<pre class="panel scroll command">{escaped(command_of(record))}</pre>'
        f"{table_of(['model', 'files', 'digest'], parents, (1,))}"
        f'<div class="settings">{table_of(["setting", "meaning"], settings)}</div>'
    )


def _setting(name: str, value: Any) -> str:
    """With spaces, where a narrow screen can break the line."""
    return f"{name} = {text_of(value) or 'empty'}"


def _default(value: Any) -> str:
    return f" (default: {text_of(value) or 'empty'})"


def _history(record: Mapping[str, Any]) -> str:
    """The chain of operations, from the first to this one."""
    rows = [
        [number, step["operation"], _changed(step), f"{step['digest'][:16]}…"]
        for number, step in enumerate([*record["history"], record], start=1)
    ]
    header = ["", "operation", "settings that were changed", "digest of the result"]
    return f"<h2>History</h2>{table_of(header, rows, (0,))}"


def _changed(step: Mapping[str, Any]) -> str:
    """The settings of an operation that differ from their defaults."""
    told = settings_told(step)
    return ", ".join(_setting(n, v) for n, v, default, _ in told if v != default) or MISSING


def _versions(record: Mapping[str, Any]) -> str:
    said = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f'<h2>Versions</h2><p class="soft">{escaped(said)}</p>'
