"""Prose inside program text: docstrings and blocks of comments, and a rule for what is prose."""

import ast
import inspect
import re
import warnings
from collections.abc import Iterator

MIN_CHARACTERS = 200
MIN_SENTENCES = 2
MIN_WORD_SHARE = 0.75  # of words, each with one space after it, among the characters

_SENTENCE_END = re.compile(r"[a-z0-9)`'\"][.!?](?=\s|$)")
_WORD = re.compile(r"[^\W\d_]+ ?")
_COMMENTS = re.compile(r"(?:\n[ \t]*#(?:[ \t][^\n]*)?){3,}")
_LICENCE = re.compile(r"copyright|licen[cs]e", re.IGNORECASE)


def is_prose(text: str, word_share: float = MIN_WORD_SHARE) -> bool:
    """Whether a text is long enough, has sentences, and is mostly words."""
    if len(text) < MIN_CHARACTERS:
        return False
    if len(_SENTENCE_END.findall(text)) < MIN_SENTENCES:
        return False
    return len(_WORD.sub("", text)) <= (1 - word_share) * len(text)


def passages(source: str) -> Iterator[str]:
    """Yields the docstrings, then the blocks of comments, of Python source that are prose."""
    yield from filter(is_prose, _docstrings(source))
    for match in _COMMENTS.finditer(source):
        lines = match.group().splitlines()[1:]
        text = "\n".join(line.strip()[1:].removeprefix(" ") for line in lines).strip("\n")
        if is_prose(text) and not _LICENCE.search(text):
            yield text


def _docstrings(source: str) -> Iterator[str]:
    '''Triple-quoted strings at the start of the file or after a line that ends in a colon.

    Every second piece between triple quotes is inside a string.  This is many times faster than
    ast.parse and a walk (docs/measurements.md: prose-docstrings); a source that has """ in another
    kind of string only makes code a candidate, which is_prose turns away.
    '''
    pieces = source.split('"""')
    for i in range(1, len(pieces) - 1, 2):
        before, inside = pieces[i - 1], pieces[i]
        if len(inside) < MIN_CHARACTERS:
            continue
        code = before.rstrip("rRuU")
        if not (code.rstrip().endswith(":") or (i == 1 and _only_comments(code))):
            continue
        text = _evaluate(f'{before[len(code) :]}"""{inside}"""')
        if text is not None:
            yield inspect.cleandoc(text)


def _evaluate(literal: str) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes that Python does not know
        try:
            return ast.literal_eval(literal)
        except (ValueError, SyntaxError):
            return None


def _only_comments(source: str) -> bool:
    return all(not line or line.startswith("#") for line in source.splitlines())
