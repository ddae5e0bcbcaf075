"""Prompts of files and flags: read as the standard library reads them, or refused."""

import gzip
import io
import json
import os
import random
import subprocess
import sys

import pytest
import zstandard

from dynmoe_jax.config import ConfigError
from dynmoe_jax.data.sources.files import open_bytes
from dynmoe_jax.inference.__main__ import _converse
from dynmoe_jax.inference.arguments import parse
from dynmoe_jax.inference.prompts import read_prompts
from dynmoe_jax.inference.writer import Writer
from tests.odd_files import as_json, broken_line, odd_lines, odd_text, odd_value, write_odd

MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL", "a.jsonl.gz", "a.jsonl.zst"])
def test_line_ends_of_unicode_stand_within_strings_and_a_mark_before_all(tmp_path, name):
    prompts = ["one\u2028two", "three\x85four", "five\x0bsix\x1c", "\ufeffseven"]
    lines = [json.dumps(prompts[0], ensure_ascii=False)]
    lines += [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts[1:]]
    content = MARK + "\r\n".join(lines).encode()
    content = gzip.compress(content) if name.endswith(".gz") else content
    content = zstandard.compress(content) if name.endswith(".zst") else content
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize("mark", [b"", MARK])
def test_lines_of_text_are_those_of_python(tmp_path, mark):
    path = tmp_path / "a.txt"
    path.write_bytes(mark + "one\u2028two\r\n\nthree\x85four \rfive\x0b\n".encode())
    assert read_prompts(path) == ["one\u2028two", "three\x85four ", "five\x0b"]


BROKEN = {
    b'"\\ud83d"\n': "line 1, holds a lone surrogate, which has no UTF-8 encoding",
    b'"fine"\n{"prompt": "hi \\udc00"}\n': "line 2, holds a lone surrogate",
    b'"a\\u0000b"\n': "line 1, holds a NUL character",
    b"[" * 100_000: "line 1: not JSON that can be read: RecursionError",
    b"9" * 5_000: "line 1: not JSON that can be read: ValueError",
    b'"caf\xe9"': "line 1: not UTF-8 at byte 4",
    b'"one"\n{"text": "two"}': "line 2, must be a string, or a record with a string 'prompt'",
    b'"one"\n{"prompt" "two"}': "line 2: not JSON: Expecting ':' delimiter at column 11",
}


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: content[:20].decode("latin-1"))
def test_a_line_that_is_no_prompt_is_named(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_prompts(tmp_path / "a.jsonl")
    assert BROKEN[content] in str(caught.value)
    assert f"--prompts_file={tmp_path}/a.jsonl" in str(caught.value)


def test_files_that_are_no_prompts_at_all(tmp_path):
    (tmp_path / "a.txt").write_bytes("utf-16".encode("utf-16-le"))
    with pytest.raises(ConfigError, match="line 1, holds a NUL character; is it binary or UTF-16"):
        read_prompts(tmp_path / "a.txt")
    (tmp_path / "a.json").write_text('["one", "two"]')
    with pytest.raises(ConfigError, match=r"neither text nor JSON Lines.*call it \.jsonl"):
        read_prompts(tmp_path / "a.json")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'"one"\n' * 99)[:-9])
    with pytest.raises(ConfigError, match="the compressed stream is truncated"):
        read_prompts(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(ConfigError, match="line 1: cannot be read: Is a directory"):
        read_prompts(tmp_path / "b.jsonl")


@pytest.mark.parametrize("flag", ["--prompt", "--stop"])
def test_bytes_that_are_not_utf_8_are_refused(flag):
    # So Python hands over what a shell writes as $'caf\xe9'.
    with pytest.raises(ConfigError, match=f"{flag}=.*caf.*xe9.* holds a lone surrogate"):
        parse(["--workdir=a", "--prompt=b", f"{flag}=caf\udce9"], interactive=False)


def test_a_command_with_a_name_and_a_prompt_that_are_not_utf_8_ends_with_a_sentence(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    with open(path, "wb") as file:
        file.write(b"{}\n")
    command = [sys.executable, "-m", "dynmoe_jax.inference", f"--workdir={tmp_path}"]
    asked = subprocess.run(
        [*map(os.fsencode, command), b"--prompts_file=" + path, b"--prompt=fine"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert (asked.returncode, asked.stderr) == (2, b"")
    assert rb"caf\xe9.jsonl, line 1, must be a string" in asked.stdout
    assert asked.stdout.count(b"\n") == 1


def test_typed_text_that_is_not_utf_8_ends_no_conversation(monkeypatch, capsys, letters):
    class Alone(Writer):
        def __init__(self):
            self._tokenizer, self._begin_with_bos = letters, False

        def write(self, prompts, **more):
            return [self.encode(prompt) for prompt in prompts]

    def typed(_):
        if not lines:
            raise EOFError
        line = lines.pop(0)
        return line.decode() if isinstance(line, bytes) else line

    lines = [b"caf\xe9", "caf\udce9"]
    monkeypatch.setattr("builtins.input", typed)
    _converse(Alone(), parse(["--workdir=a"], interactive=True), None)
    printed = capsys.readouterr().out
    assert "That line is not UTF-8; type it again." in printed
    assert "The prompt holds a lone surrogate, which has no UTF-8 encoding" in printed


def oracle(path):
    """Prompts as the standard library reads them; None where a line is none."""
    with open_bytes(path) as stream:
        content = stream.read()
    try:
        if ".txt" in path.name:
            lines = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig")
            prompts = [line.rstrip("\n") for line in lines if line.strip()]
        else:
            lines = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="\n")
            found = [json.loads(line) for line in lines if line.strip(" \t\r\n\x0b\x0c")]
            prompts = [v["prompt"] if isinstance(v, dict) else v for v in found]
        "".join(prompts).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return None if any("\0" in prompt for prompt in prompts) else prompts or None


def test_odd_files_are_read_as_the_standard_library_reads_them(tmp_path, fuzz_cases):
    read = refused = 0
    for case in range(fuzz_cases(150, 1500)):
        rng = random.Random(case)
        suffix = rng.choice((".txt", ".jsonl", ".jsonl", ".ndjson"))
        lines = []
        for _ in range(rng.randint(0, 5)):
            if suffix == ".txt":
                lines.append(odd_text(rng).encode())
            elif rng.random() < 0.8:
                text = odd_text(rng)
                value = text if rng.random() < 0.5 else {"prompt": text, "more": odd_value(rng)}
                lines.append(as_json(rng, value).encode())
            else:
                lines.append(as_json(rng, odd_value(rng)).encode())
        if rng.random() < 0.15:
            lines.insert(rng.randint(0, len(lines)), broken_line(rng))
        stem = rng.choice(("a", "b c", "[x]", "é", "-", "a.b"))
        path, whole = write_odd(rng, tmp_path, stem, suffix, odd_lines(rng, lines))
        expected = oracle(path) if whole else None
        found = said = None
        try:
            found = read_prompts(path)
        except ConfigError as error:
            said = str(error)
        assert found == expected, f"case {case}: {said}"
        assert said is None or "\n" not in said
        read, refused = read + (said is None), refused + (said is not None)
    assert min(read, refused) > 20
