"""Noise in place of data: every reader says what is broken, and none of them fails."""

import contextlib
import gzip
import json
import random
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dynmoe_jax import config
from dynmoe_jax.data import DataError, open_tokenizer, prepare
from dynmoe_jax.data.sources.document import Broken, Document
from dynmoe_jax.data.sources.registry import read_documents

ONCE = {"deadline": None, "suppress_health_check": list(HealthCheck)}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
LINES = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries({"text": JSON}, optional={"domain": JSON}).map(
        lambda record: json.dumps(record).encode()
    ),
    st.sampled_from([b"", b" \t", b"\0", b'{"text": "\\ud800\\udc00"}', b'{"text": "\\udc00"}']),
)


def read(kind, path, **changes):
    found = list(read_documents(config.Data(sources=f"{kind}:{path}", **changes)))
    for item in found:
        assert isinstance(item, Document | Broken)
        if isinstance(item, Document):
            assert item.text.strip()
            assert "\0" not in item.text + item.domain
            (item.text + item.domain + item.origin).encode()
        else:
            assert item.reason
            assert "\n" not in item.reason
    return found


@settings(max_examples=300, **ONCE)
@given(lines=st.lists(LINES, max_size=5), ending=st.sampled_from([b"\n", b"\r\n"]))
@example([b'{"text": "\xef\xbf\xbe"}'], b"\n")
def test_json_lines(tmp_path, lines, ending):
    path = tmp_path / "a.jsonl"
    path.write_bytes(ending.join(lines))
    whole = path.read_bytes().split(b"\n")
    # At most one item a line, each of the line that it names.
    numbers = [int(item.origin.rpartition(":")[2]) for item in read("jsonl", path)]
    assert numbers == sorted(set(numbers))
    assert not [n for n in numbers if n > len(whole)]
    for number in set(range(1, len(whole) + 1)) - set(numbers):
        line = whole[number - 1].removeprefix(b"\xef\xbb\xbf")
        assert not line.strip() or not str(json.loads(line)["text"]).strip()


@settings(max_examples=100, **ONCE)
@given(content=st.binary(max_size=200), suffix=st.sampled_from(["txt", "txt.gz", "txt.zst"]))
def test_text_files(tmp_path, content, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    assert len(read("text", path)) <= 1


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A sound file of each kind that has a format of its own."""
    folder = tmp_path_factory.mktemp("sound")
    texts = [f"text number {n}, of a few words" for n in range(50)]
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    table = pyarrow.table({"text": texts, "domain": ["a"] * 50, "list": [[text] for text in texts]})
    pyarrow.parquet.write_table(table, folder / "parquet")
    (folder / "gz").write_bytes(gzip.compress(lines))
    (folder / "zst").write_bytes(zstandard.compress(lines))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "t"),
        model_type="bpe",
        vocab_size=285,
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "t.model").rename(folder / "model")
    return folder


def damaged(content, draw):
    """Content with bytes changed, or cut off."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content[: draw.randint(0, len(content))] if draw.random() < 0.5 else content)


@pytest.mark.parametrize("kind", ["parquet", "gz", "zst"])
def test_damaged_files_of_known_formats(sound, tmp_path, kind):
    draw = random.Random(0)
    source = "parquet" if kind == "parquet" else "jsonl"
    for number in range(60):
        path = tmp_path / f"{number}.{kind}"
        path.write_bytes(damaged((sound / kind).read_bytes(), draw))
        read(source, path)


@pytest.mark.parametrize("field", ["list", "list.element", "list.list.element", "text.x", ""])
def test_parquet_columns_that_are_no_text(sound, tmp_path, field):
    path = tmp_path / "a.parquet"
    path.write_bytes((sound / "parquet").read_bytes())
    found = read("parquet", path, text_field=field)
    assert found
    assert all(isinstance(item, Broken) for item in found)


def test_damaged_tokenizers_are_refused_or_work(sound, tmp_path):
    draw, path = random.Random(0), tmp_path / "t.model"
    loaded = 0
    for _ in range(60):
        path.write_bytes(damaged((sound / "model").read_bytes(), draw))
        with contextlib.suppress(DataError):
            assert open_tokenizer(path).encode("some words").dtype == np.int32
            loaded += 1
    assert 0 < loaded < 60


@settings(max_examples=100, **ONCE)
@given(content=st.binary(max_size=100))
def test_bytes_are_no_tokenizer(tmp_path, content):
    path = tmp_path / "t.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"config\.data\.tokenizer="):
        open_tokenizer(path)


def test_damaged_array_record_is_reported_example_by_example(prepared, tmp_path):
    """As a source of its own: the dataset that a preparation wrote."""
    dataset = shutil.copytree(next(prepared.directory.glob("*/1.0.0")), tmp_path / "copy")
    largest = max(dataset.glob("*array_record*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    largest.write_bytes(content)
    data = config.Data(sources=f"tfds:{dataset}")
    assert [item for item in read_documents(data) if isinstance(item, Broken)]
    with pytest.raises(DataError, match="are broken"):
        prepare(data, tmp_path / "out")
