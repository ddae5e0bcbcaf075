"""Prepared data that is no longer what was written, sources no longer what was read."""

import collections
import dataclasses
import itertools
import json
import os
import random
import shutil

import pytest

from dynmoe_jax import config
from dynmoe_jax.data import DataError, TrainStream, check_unchanged, prepare
from dynmoe_jax.data.preparation.prepare import Prepared
from tests.data.made_text import write_jsonl


@pytest.fixture
def copied(prepared, tmp_path):
    """A preparation that a test may spoil."""
    return shutil.copytree(prepared.directory, tmp_path / prepared.directory.name)


def shard(directory):
    """The largest ArrayRecord file of the training text."""
    files = directory.rglob("*train_alpha.array_record*")
    return max(files, key=lambda path: path.stat().st_size)


REMEDY = "delete that folder, and the same command prepares it anew"


@pytest.mark.parametrize("left", [0, 100, 40_000])
def test_truncated_shard_is_found_before_training(copied, left):
    os.truncate(shard(copied), left)
    named = rf"damaged \(.*train_alpha\S* has {left:,} bytes instead of [\d,]+\); {REMEDY}"
    with pytest.raises(DataError, match=named) as caught:
        Prepared(copied)
    assert "\n" not in str(caught.value)


def test_missing_shard_is_found_before_training(copied):
    shard(copied).unlink()
    with pytest.raises(DataError, match=rf"train_alpha\S* is missing\); {REMEDY}"):
        Prepared(copied)


def test_summary_that_cannot_be_read_is_one_sentence(copied):
    os.truncate(copied / "summary.json", 20)
    with pytest.raises(DataError, match=rf"summary.json cannot be read\); {REMEDY}"):
        Prepared(copied)


def test_altered_shard_is_found_when_it_is_read(copied, tokenizer, settings):
    """Of the same size; ArrayRecord's own checksums find it, in the thread that makes batches."""
    path, draw = shard(copied), random.Random(0)
    content = bytearray(path.read_bytes())
    for _ in range(400):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    with (
        TrainStream(Prepared(copied), tokenizer, settings, 4, 0) as stream,
        pytest.raises(DataError, match=REMEDY) as caught,
    ):
        collections.deque(itertools.islice(stream, 200), maxlen=0)
    assert "\n" not in str(caught.value)


def test_whole_preparation_of_an_earlier_version_is_used(copied, tokenizer, settings):
    """It says neither how large its files are nor which documents it holds."""
    with TrainStream(Prepared(copied), tokenizer, settings, 4, 0) as stream:
        next(stream)
        state = stream.get_state()
    summary = json.loads((copied / "summary.json").read_text())
    del summary["files"], summary["content"]
    (copied / "summary.json").write_text(json.dumps(summary))
    with TrainStream(Prepared(copied), tokenizer, settings, 4, 0) as stream:
        stream.set_state(state)
    with TrainStream(Prepared(copied), tokenizer, settings, 4, 0) as old:
        state = old.get_state()
    with TrainStream(prepare(settings, copied.parent / "new"), tokenizer, settings, 4, 0) as stream:
        stream.set_state(state)


def test_other_documents_of_the_same_settings_are_refused(copied, tokenizer, settings):
    """The source ``python`` gives others when a package was installed in between."""
    with TrainStream(Prepared(copied), tokenizer, settings, 4, 0) as stream:
        state = stream.get_state()
    summary = json.loads((copied / "summary.json").read_text())
    (copied / "summary.json").write_text(json.dumps(summary | {"content": "0" * 64}))
    with (
        TrainStream(Prepared(copied), tokenizer, settings, 4, 0) as stream,
        pytest.raises(DataError, match="other documents, although the settings are the same"),
    ):
        stream.set_state(state)


@pytest.fixture
def begun(tmp_path):
    """Settings of two files, where they are prepared, and the fingerprint that the run keeps."""
    for name in ("books", "notes"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(9)])
    data = config.Data(sources=f"jsonl:{tmp_path}/*.jsonl")
    prepared = prepare(data, tmp_path / "out")
    return data, tmp_path / "out", prepared.fingerprint


def change_one_line(folder):
    path = folder / "notes.jsonl"
    path.write_text(path.read_text().replace("notes 7", "notes X"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (change_one_line, "notes.jsonl has changed since it was prepared"),
        (lambda folder: (folder / "books.jsonl").unlink(), "books.jsonl is missing among"),
        (lambda folder: (folder / "x.jsonl").write_text('{"text": "x"}'), "x.jsonl is new among"),
    ],
)
def test_source_that_changed_since_the_run_began_is_named(begun, tmp_path, change, sentence):
    data, directory, fingerprint = begun
    check_unchanged(data, directory, fingerprint)
    change(tmp_path)
    before = sorted(directory.iterdir())
    with pytest.raises(DataError, match=rf"other data: {sentence}.*set it back") as caught:
        check_unchanged(data, directory, fingerprint)
    assert "\n" not in str(caught.value)
    assert sorted(directory.iterdir()) == before  # nothing was prepared in vain


def test_moved_source_is_the_same_source(begun, tmp_path):
    _, directory, fingerprint = begun
    (tmp_path / "moved").mkdir()
    for name in ("books.jsonl", "notes.jsonl"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    check_unchanged(config.Data(sources=f"jsonl:{tmp_path}/moved/*"), directory, fingerprint)


def test_changed_source_is_refused_without_the_old_preparation_too(begun, tmp_path):
    data, directory, fingerprint = begun
    shutil.rmtree(directory)
    check_unchanged(data, directory, fingerprint)
    change_one_line(tmp_path)
    with pytest.raises(DataError, match="its files, or how they are read have changed"):
        check_unchanged(data, directory, fingerprint)


def test_changed_way_of_reading_is_named(begun):
    data, directory, fingerprint = begun
    data = dataclasses.replace(data, max_megabytes=1.0)
    with pytest.raises(DataError, match=r"config.data.max_megabytes=1.0 was 0.0; set it back"):
        check_unchanged(data, directory, fingerprint)
