"""Prose inside program text: docstrings and blocks of comments, and a rule for what is prose."""

import ast
import inspect
import re
from collections.abc import Iterator

MIN_CHARACTERS = 200
MIN_SENTENCES = 2
MIN_LETTER_SHARE = 0.75  # of letters and single spaces among the characters

_SENTENCE_END = re.compile(r"[a-z0-9)`'\"][.!?](?=\s|$)")
_LETTER = re.compile(r"[^\W\d_]|(?<=\S) (?=\S)")
# A triple-quoted string that is the first thing in a file or after a line that ends in a colon.
# A regular expression, because ast.parse and a walk read 1.7 MB/s here and this reads 50 times
# that; what it may take for a docstring by mistake is still a string literal in that place.
_DOCSTRING = re.compile(
    r"""(?:\A(?:\#.*\n|\s*\n)*|:[ \t]*(?:\#.*)?\n(?:[ \t]*\n)*)[ \t]*"""
    r"""([rRuU]?(?P<quotes>\"{3}|'{3})(?:[^\\]|\\.)*?(?P=quotes))""",
    re.DOTALL,
)
_COMMENTS = re.compile(r"(?:^[ \t]*#(?:[ \t].*)?\n){3,}", re.MULTILINE)
_LICENCE = re.compile(r"copyright|licen[cs]e", re.IGNORECASE)


def is_prose(text: str) -> bool:
    """Whether a text is long enough, has sentences, and is mostly words."""
    if len(text) < MIN_CHARACTERS:
        return False
    if len(_SENTENCE_END.findall(text)) < MIN_SENTENCES:
        return False
    return len(_LETTER.findall(text)) >= MIN_LETTER_SHARE * len(text)


def passages(source: str) -> Iterator[str]:
    """Yields the docstrings, then the blocks of comments, of Python source that are prose."""
    for match in _DOCSTRING.finditer(source):
        literal = match.group(1)
        if len(literal) < MIN_CHARACTERS:
            continue
        try:
            text = inspect.cleandoc(ast.literal_eval(literal))
        except (ValueError, SyntaxError):
            continue
        if is_prose(text):
            yield text
    for match in _COMMENTS.finditer(source):
        lines = (line.strip()[1:].removeprefix(" ") for line in match.group().splitlines())
        text = "\n".join(lines).strip("\n")
        if not _LICENCE.search(text) and is_prose(text):
            yield text
