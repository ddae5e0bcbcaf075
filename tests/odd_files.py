"""Odd texts, JSON values and files, drawn from a seed: what files of others have held.

A reader is right if it reads them as the standard library does, or says in one sentence why not.
"""

import gzip
import json
import random

import zstandard

LETTERS = ("a", "B", " ", "é", "漢", "😀", "\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\t", "\r",
           "\ufeff", '"', "\\", "{", "[", ",", "▁", "\u00a0", "0", "\x7f")  # fmt: skip
NUMBERS = (0, -1, 7, 2.5, 1.0, -0.0, 1e300, 2**63, 10**30, float("nan"), float("inf"), True, False)


def odd_text(rng: random.Random, least: int = 0) -> str:
    """A short string of letters that readers stumble over."""
    return "".join(rng.choices(LETTERS, k=rng.randint(least, 8)))


def odd_value(rng: random.Random, depth: int = 2):
    """A JSON value."""
    kind = rng.randrange(8 if depth else 5)
    if kind < 3:
        return odd_text(rng)
    if kind == 3:
        return rng.choice(NUMBERS)
    if kind == 4:
        return None
    if kind < 7:
        return [odd_value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return {odd_text(rng): odd_value(rng, depth - 1) for _ in range(rng.randint(0, 3))}


def as_json(rng: random.Random, value) -> str:
    """A value in one of the ways to write it."""
    return json.dumps(value, ensure_ascii=rng.random() < 0.5)


def broken_line(rng: random.Random) -> bytes:
    """A line that is no JSON in UTF-8, or holds a string that UTF-8 does not have."""
    return rng.choice(
        (
            b'{"prompt": "cut',
            b"{'prompt': 'single quotes'}",
            b'"caf\xe9"',
            b'"\\ud83d"',
            b'"\\u0000"',
            b'{"prompt": "\\udc00 alone"}',
            b"[" * 100_000,
            b"9" * 5_000,
            b"\xff\xfe",
            b'"one" "two"',
            b'"tab\there"',
            "\ufeff1".encode(),
        )
    )


def odd_lines(rng: random.Random, lines: list[bytes]) -> bytes:
    """Lines as a file: with or without a byte order mark, line ends of several kinds."""
    end = rng.choice((b"\n", b"\n", b"\r\n", b"\n\n", b" \n"))
    content = end.join(lines) + rng.choice((b"", end))
    return rng.choice((b"", b"", b"\xef\xbb\xbf")) + content


def write_odd(rng: random.Random, folder, stem: str, suffix: str, content: bytes):
    """(path of a file with a content, plain, compressed or damaged; whether it is whole)."""
    how = rng.choice(("", "", "", ".gz", ".zst", "cut.gz", "cut.zst", "not.gz"))
    whole = how in ("", ".gz", ".zst")
    path = folder / f"{stem}{suffix}{how.removeprefix('cut').removeprefix('not')}"
    if how.endswith(".gz") and how != "not.gz":
        content = gzip.compress(content)
    elif how.endswith(".zst"):
        content = zstandard.compress(content)
    path.write_bytes(content[: len(content) // 2] if how.startswith("cut") else content)
    return path, whole
