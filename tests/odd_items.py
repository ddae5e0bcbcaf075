"""Odd files of items, and what the standard library reads in them."""

import json

from dynmoe_jax.data.sources.files import open_bytes
from tests.odd_files import as_json, broken_line, odd_lines, odd_text, odd_value, write_odd


def odd_items(rng, folder):
    """(path of a file of items, its items as the oracle reads them, or None)."""
    suffix, names = rng.choice((".jsonl", ".json")), [odd_text(rng, 1) for _ in range(3)]
    items = []
    for _ in range(rng.randint(0, 4)):
        some = rng.sample(names, rng.randint(0, 3))
        items.append({name: odd_value(rng) for name in some})
    if suffix == ".jsonl":
        lines = [as_json(rng, item).encode() for item in items]
        if rng.random() < 0.2:
            lines.insert(rng.randint(0, len(lines)), broken_line(rng))
    else:
        whole = rng.choice((items, {"examples": items}, {"examples": items}, items[:1] or 3))
        lines = [as_json(rng, whole).encode()]
        if rng.random() < 0.1:
            lines.append(broken_line(rng))
    path, whole = write_odd(rng, folder, "items", suffix, odd_lines(rng, lines))
    return path, oracle(path) if whole else None


def oracle(path):
    """Records as the standard library reads them; None where they are none."""
    with open_bytes(path) as stream:
        text = stream.read()
    try:
        text = text.decode("utf-8-sig")
        if ".jsonl" in path.name:
            items = [json.loads(line) for line in text.split("\n") if line.strip(" \t\r\n\x0b\x0c")]
        else:
            items = json.loads(text)
            items = items.get("examples") if isinstance(items, dict) else items
    except (ValueError, RecursionError):
        return None
    records = isinstance(items, list) and items and all(isinstance(item, dict) for item in items)
    return items if records else None
