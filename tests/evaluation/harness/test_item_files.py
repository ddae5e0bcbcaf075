"""Files of items: what the standard library's ``json`` reads, or a sentence."""

import gzip
import json
import random
import re

import pytest
import zstandard

from dynmoe_jax import config
from dynmoe_jax.evaluation.harness.item_files import find_items, read_items
from tests.odd_items import odd_items

MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.zst"])
@pytest.mark.parametrize("mark", [b"", MARK])
def test_marks_and_line_ends_of_unicode(tmp_path, name, mark):
    items = [{"goal": "a\u2028b\x85c"}, {"goal": "\ufeffd"}]
    lines = [json.dumps(item, ensure_ascii=False) for item in items]
    text = "\r\n".join(lines) if "jsonl" in name else f"[{','.join(lines)}]"
    content = mark + text.encode()
    content = gzip.compress(content) if name.endswith("gz") else content
    content = zstandard.compress(content) if name.endswith("zst") else content
    (tmp_path / name).write_bytes(content)
    assert read_items(tmp_path / name) == items


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def test_items_that_are_not_alike_lose_nothing_and_it_is_said(tmp_path, capsys):
    items = [
        {"goal": "one", "label": 7, "choices": ["a", 1]},
        {"goal": "two", "label": "7a", "hint": "here", "choices": ["b", True]},
        {"goal": None, "label": 2.5, "choices": []},
    ]
    write(tmp_path / "a.jsonl", items)
    assert read_items(tmp_path / "a.jsonl") == [
        {"goal": "one", "label": "7", "choices": ["a", "1"], "hint": None},
        {"goal": "two", "label": "7a", "choices": ["b", "true"], "hint": "here"},
        {"goal": None, "label": "2.5", "choices": [], "hint": None},
    ]
    printed = capsys.readouterr().out
    assert "'label' (item 2, item 1)" in printed
    assert "'choices.[]' (item 1, item 1)" in printed
    assert "some of the 3 items lack 'hint' (2, the first is item 1), which is None" in printed


def test_lone_surrogates_are_replaced_and_said(tmp_path, capsys):
    (tmp_path / "a.json").write_bytes(
        b'[{"a": "fine"}, {"\\ud83d": ["\\udc00", "\\ud83d\\ude00"]}]'
    )
    found = read_items(tmp_path / "a.json")
    assert found[1] == {"a": None, "\ufffd": ["\ufffd", "\U0001f600"]}
    assert "1 of 2 items hold lone surrogates, which no encoding has, the first is item 2" in (
        capsys.readouterr().out
    )


BROKEN = {
    ("a.jsonl", b'{"a": 1}\n[2]\n'): "a.jsonl, line 2, must hold records, not a list",
    ("a.jsonl", b'{"a": 1}\n\n{"a" 2}'): "line 3, cannot be read as JSON (not JSON: Expecting",
    ("a.jsonl", b'{"a": "caf\xe9"}'): "line 1, cannot be read as JSON (not UTF-8 at byte 10)",
    ("a.jsonl", b"[" * 100_000): "line 1, cannot be read as JSON (not JSON that can be read: R",
    ("a.json", b"9" * 5_000): "a.json cannot be read as JSON (not JSON that can be read: ValueErr",
    ("a.json", b'{"a": 1}\n{"a": 2}\n'): "at line 2, column 1); call it .jsonl if each of its",
    ("a.json.gz", b"no gzip"): "cannot be read: Not a gzipped file",
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-9]): "the compressed stream is truncated",
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n')[:12] + b"\xff" * 20): "cannot be read",
    ("a.jsonl", b"\n\n"): "must hold records, one at least",
}


@pytest.mark.parametrize(("name", "content"), BROKEN, ids=range(len(BROKEN)))
def test_what_cannot_be_read_is_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(config.ConfigError) as caught:
        read_items(tmp_path / name)
    assert BROKEN[name, content] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("depth", [100, 400, 800, 980, 10_000])
def test_deep_nesting_is_read_or_refused(tmp_path, depth):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": ' + b"[" * depth + b"]" * depth + b"}")
    try:
        found = read_items(tmp_path / "a.jsonl")
    except config.ConfigError as error:
        found = str(error)
    assert isinstance(found, list) if depth < 200 else found
    assert not isinstance(found, str) or "nest" in found or "RecursionError" in found


def test_names_are_taken_as_they_are(tmp_path):
    """Neither as patterns, nor where they belong to folders."""
    for name in ("a[1].jsonl", "a1.jsonl", "sub/b.json.zst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "b.jsonl").mkdir()
    assert find_items(tmp_path, ["a[1]"]).name == "a[1].jsonl"
    assert find_items(tmp_path, ["none", "b"]).name == "b.json.zst"
    assert find_items(tmp_path, ["a*"], optional=True) is None


def leaves(value, place=()):
    if isinstance(value, dict):
        for name, part in value.items():
            yield from leaves(part, (*place, name))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from leaves(part, (*place, number))
    else:
        yield place, value


def general(place):
    return tuple("[]" if isinstance(part, int) else part for part in place)


def expected_leaves(items):
    """{(number of the item, place): value} of all that is no None."""
    flat = {(i, place): value for i, item in enumerate(items) for place, value in leaves(item)}
    texts = {general(place) for (_, place), value in flat.items() if isinstance(value, str)}
    found = {}
    for key, value in flat.items():
        if isinstance(value, str):
            found[key] = re.sub("[\ud800-\udfff]", "\ufffd", value)
        elif value is not None:
            found[key] = json.dumps(value) if general(key[1]) in texts else value
    return {key: repr(value) for key, value in found.items()}


def test_odd_files_are_read_as_the_standard_library_reads_them(tmp_path, fuzz_cases, capsys):
    read = refused = 0
    for case in range(fuzz_cases(150, 1500)):
        path, items = odd_items(random.Random(case), tmp_path)
        found = said = None
        try:
            found = read_items(path)
        except config.ConfigError as error:
            said = str(error)
        if items is None:
            assert found is None, f"case {case}"
            assert "\n" not in said
            refused += 1
            continue
        assert said is None, f"case {case}"
        assert len({tuple(item) for item in found}) == 1
        flat = {(i, place): v for i, item in enumerate(found) for place, v in leaves(item)}
        flat = {key: repr(value) for key, value in flat.items() if value is not None}
        assert flat == expected_leaves(items), f"case {case}"
        read += 1
    assert min(read, refused) > 20
