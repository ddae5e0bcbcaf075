"""Files of any name: each is read under its own, and it can be told which one it was."""

import glob
import json
import os
import random
import re

import pyarrow
import pyarrow.parquet
import pytest

from dynmoe_jax import config
from dynmoe_jax.data import DataError, prepare
from dynmoe_jax.data.sources.document import Broken
from dynmoe_jax.data.sources.registry import read_documents

NOT_UTF_8 = os.fsdecode(b"caf\xe9")
LETTERS = ("a", "B", " ", ".", "é", "漢", "😀", "[", "]", "!", "*", "?", "~", "$", "%", "'", '"',
           "\\", ":", "-", "\n", "\t", "\x1b", "\u2028", "\udce9", "\udcff")  # fmt: skip
ODD = re.compile("[\udc80-\udcff]")


def read(sources):
    return list(read_documents(config.Data(sources=sources)))


def write(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_a_name_that_is_not_utf_8_is_told_by_its_bytes(tmp_path):
    write(tmp_path / f"{NOT_UTF_8}.jsonl", "one")
    (tmp_path / f"{NOT_UTF_8}.txt").write_text("two")
    (tmp_path / f"{NOT_UTF_8}.broken").write_bytes(b"none")
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["three"]}), sink)
    (tmp_path / f"{NOT_UTF_8}.parquet").write_bytes(sink.getvalue())
    (item,) = read(f"jsonl:{tmp_path}/*.jsonl")
    assert item[:3] == ("one", "caf\\xe9", f"{tmp_path}/caf\\xe9.jsonl:1")
    assert read(f"text:{tmp_path}/{NOT_UTF_8}.txt")[0].origin == f"{tmp_path}/caf\\xe9.txt"
    (item,) = read(f"parquet:{tmp_path}/*.parquet")
    assert item[:3] == ("three", "caf\\xe9", f"{tmp_path}/caf\\xe9.parquet:1")
    assert read(f"parquet:{tmp_path}/*.broken")[0].origin == f"{tmp_path}/caf\\xe9.broken:1"


def test_data_are_prepared_from_files_of_any_name(tmp_path, capsys):
    names = [NOT_UTF_8, "a b", "x[1]", "*", "line\nend", "😀", "\x1b[31m", "'\"", "é" * 100]
    for name in names:
        write(tmp_path / f"{name}.jsonl", *(f"Text {i} of {len(name)}" for i in range(9)))
    sources = f"jsonl:{tmp_path}/*.jsonl"
    prepared = prepare(config.Data(sources=sources, heldout_fraction=0.2), tmp_path / "out")
    assert set(prepared.domains) == {"caf\\xe9", *names[1:]}
    again = prepare(config.Data(sources=sources, heldout_fraction=0.2), tmp_path / "out")
    assert again.fingerprint == prepared.fingerprint
    assert "Reusing" in capsys.readouterr().out


def test_a_name_with_brackets_is_no_pattern_where_there_is_such_a_file(tmp_path):
    write(tmp_path / "a1.jsonl", "another")
    sources = f"jsonl:{tmp_path}/a[1].jsonl"
    assert [item.text for item in read(sources)] == ["another"]
    write(tmp_path / "a[1].jsonl", "this one")
    assert [item.text for item in read(sources)] == ["this one"]
    # A pattern that matches its own name stays a pattern.
    write(tmp_path / "a*.jsonl", "third")
    found = {item.text for item in read(f"jsonl:{tmp_path}/a*.jsonl")}
    assert found == {"another", "this one", "third"}


def test_names_that_a_list_of_sources_cannot_hold_are_one_sentence(tmp_path):
    write(tmp_path / "a,b.jsonl", "x")
    with pytest.raises(DataError, match=r"config\.data\.sources"):
        read(f"jsonl:{tmp_path}/a,b.jsonl")
    assert [item.text for item in read(f"jsonl:{tmp_path}/a?b.jsonl")] == ["x"]


def test_odd_names_are_read_under_themselves(tmp_path, fuzz_cases):
    for case in range(fuzz_cases(100, 1000)):
        rng = random.Random(case)
        folder = tmp_path / str(case)
        folder.mkdir()
        texts = {}
        for number in range(rng.randint(1, 3)):
            name = "".join(rng.choices(LETTERS, k=rng.randint(1, 8)))
            path = folder / f"{name}.jsonl"
            write(path, f"text {number}")
            texts[path] = f"text {number}"
        told = {
            path: ODD.sub(lambda found: f"\\x{ord(found[0]) - 0xDC00:x}", path.stem)
            for path in texts
        }
        for path, text in texts.items():
            found = read(f"jsonl:{path}")
            assert not any(isinstance(item, Broken) for item in found)
            others = [item for item in found if item.text != text]
            assert len(others) == len(found) - 1, f"case {case}"
            # Others only where the name is a pattern that matches itself too, as glob says.
            assert not others or str(path) in glob.glob(str(path)), f"case {case}"
            (own,) = (item for item in found if item.text == text)
            assert own.domain == (told[path] or path.name), f"case {case}"
            own.origin.encode()
