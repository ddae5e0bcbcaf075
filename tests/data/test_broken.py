import gzip
import json

import pytest
import zstandard

from dynmoe_jax import config
from dynmoe_jax.data import DataError, prepare
from dynmoe_jax.data.sources.document import Broken
from dynmoe_jax.data.sources.registry import read_documents

GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    b"{not json}\n": "not JSON",
    b'["a list"]\n': "not an object",
    b'{"txt": "misspelt"}\n': "no field 'text'",
    b'{"text": 5}\n': "of type int",
    b'{"text": null}\n': "of type NoneType",
    b'{"text": "x", "domain": ["y"]}\n': "domain is of type list",
    b'{"text": "\xff\xfe"}\n': "not UTF-8 at byte 10",
    b'{"text": "a\x00b"}\n': "not JSON",
    b'{"text": "a\\u0000b"}\n': "NUL",
    b'{"text": "\\ud800"}\n': "lone surrogate",
    b"[" * 100_000 + b"\n": "RecursionError",
    b'{"text": ' + b"9" * 10_000 + b"}\n": "ValueError",
}


def read(path):
    return list(read_documents(config.Data(sources=f"jsonl:{path}")))


def write(path, content: bytes):
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_every_kind_of_broken_line_is_reported_by_line_and_the_rest_is_read(tmp_path, name):
    path = tmp_path / name
    write(path, b"".join(GOOD + bad + b"\n" for bad in BAD_LINES))
    found = read(path)
    documents = [item for item in found if not isinstance(item, Broken)]
    broken = [item for item in found if isinstance(item, Broken)]
    assert [item.text for item in documents] == ["good"] * len(BAD_LINES)
    assert [item.origin for item in broken] == [
        f"{path}:{3 * i + 2}" for i in range(len(BAD_LINES))
    ]
    for item, reason in zip(broken, BAD_LINES.values(), strict=True):
        assert reason in item.reason


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_truncated_stream_is_not_taken_for_a_complete_one(tmp_path, name):
    path = tmp_path / name
    # Incompressible enough that half of the file is many lines.
    lines = [
        json.dumps({"text": f"{i * 7919 % 10007} {i}"}).encode() + b"\n" for i in range(20_000)
    ]
    write(path, b"".join(lines))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    *documents, last = read(path)
    assert 0 < len(documents) < len(lines)
    assert last == Broken(f"{path}:{len(documents) + 1}", "the compressed stream is truncated")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_file_that_is_not_compressed_at_all(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD)
    (only,) = read(tmp_path / name)
    assert only.origin == f"{tmp_path / name}:1"
    assert "cannot be read" in only.reason


def test_several_zstd_frames_in_one_file_are_all_read(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(GOOD * 3) + zstandard.compress(GOOD * 2))
    assert len(read(path)) == 5


def test_a_line_of_ten_megabytes_and_no_line_end_at_the_end(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    text = "word " * 2_000_000
    write(path, GOOD + json.dumps({"text": text}).encode())
    assert [len(item.text) for item in read(path)] == [4, len(text)]


def test_undecodable_and_binary_text_files_are_reported_by_name(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("utf-16", encoding="utf-16-be")
    found = list(read_documents(config.Data(sources=f"text:{tmp_path}/*")))
    assert found[0] == Broken(f"{tmp_path}/a.txt", "not UTF-8 at byte 3")
    assert found[1].origin == f"{tmp_path}/b.txt"
    assert "NUL" in found[1].reason


def test_few_broken_lines_are_printed_and_kept_in_the_report(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 50 + b"{[red]}\n" + GOOD * 49)
    data = config.Data(sources=f"jsonl:{path}", max_broken_fraction=0.01)
    report = prepare(data, tmp_path / "out").broken
    assert (report.records, report.share) == (1, 0.01)
    assert report.examples[0].startswith(f"{path}:51: not JSON")
    assert f"{path}:51: not JSON" in capsys.readouterr().out.replace("\n", "")


def test_more_broken_lines_than_allowed_fail_and_leave_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 98 + b"bad\n" * 2)
    with pytest.raises(DataError, match=r"2 of 100 .*a.jsonl:99: .*max_broken_fraction=0.01"):
        prepare(config.Data(sources=f"jsonl:{path}"), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_empty_result_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": ""}\n\n')
    with pytest.raises(DataError, match="gives no document"):
        prepare(config.Data(sources=f"jsonl:{path}"), tmp_path / "out")
