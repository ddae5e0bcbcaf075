"""Texts as trees of tokens: what texts begin with in common is there once.

A tree lies in an array in preorder: every text is a path from a root, and the tokens below token j
are those from j + 1 up to ``ends[j]``.  So token i sees token j if ``j <= i < ends[j]``.  Nothing
else need attention know (:mod:`.tree_attention`).
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tree:
    """Some texts, laid out; n is the number of distinct prefixes.

    Attributes:
      tokens: in preorder.
      depths: tokens before each one in its text, which is its position for the model.
      ends: one past the last token below each one.
      paths: for each text, where its tokens are.
    """

    tokens: Int[np.ndarray, "n"]
    depths: Int[np.ndarray, "n"]
    ends: Int[np.ndarray, "n"]
    paths: list[Int[np.ndarray, "L"]]


def build_tree(texts: Sequence[Tokens]) -> Tree:
    """Lays out texts; the same text twice has the same path."""
    tokens: list[int] = []
    depths: list[int] = []
    paths: dict[int, np.ndarray] = {}
    path: list[int] = []
    before: Tokens = ()
    for i in sorted(range(len(texts)), key=texts.__getitem__):
        shared = common_length(before, texts[i])
        fresh = texts[i][shared:]
        path = path[:shared] + list(range(len(tokens), len(tokens) + len(fresh)))
        tokens += fresh
        depths += range(shared, shared + len(fresh))
        paths[i], before = np.array(path, np.int32), texts[i]
    return Tree(
        np.array(tokens, np.int32),
        np.array(depths, np.int32),
        _ends(depths),
        [paths[i] for i in range(len(texts))],
    )


def common_length(one: Tokens, other: Tokens) -> int:
    """Length of the beginning that two texts have in common, in tokens."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _ends(depths: list[int]) -> Int[np.ndarray, "n"]:
    """One past the last token below each: the next one that is no deeper, or the end."""
    ends = np.empty(len(depths), np.int32)
    open_ones: list[int] = []
    for i, depth in enumerate([*depths, -1]):
        while open_ones and depths[open_ones[-1]] >= depth:
            ends[open_ones.pop()] = i
        open_ones.append(i)
    return ends


def group_texts(
    texts: Sequence[Tokens], contexts: Sequence[int], most: int, worth: int = 16
) -> Iterator[list[int]]:
    """Splits texts into groups, each of which is worth a tree.

    Texts of one context stay together.  Contexts that begin alike stay together too (the examples
    before the questions of a few-shot task), if that spares ``worth`` tokens and a quarter of the
    text.

    Args:
      texts: the texts.
      contexts: how many tokens of each text are its context.
      most: tokens in a tree at the most; a longer text is alone in one.
      worth: tokens.

    Yields:
      indices of texts.
    """
    order = sorted(range(len(texts)), key=lambda i: (texts[i][: contexts[i]], texts[i]))
    group: list[int] = []
    size, before = 0, ()
    for _, same in itertools.groupby(order, key=lambda i: texts[i][: contexts[i]]):
        for part in _parts(texts, list(same), most):
            first = texts[part[0]]
            shared = common_length(before, first)
            more = _size([texts[i] for i in part]) - shared
            alike = shared >= max(worth, len(first) // 4)
            if group and (not alike or size + more > most):
                yield group
                group, size, shared = [], 0, 0
                more = _size([texts[i] for i in part])
            group, size, before = group + part, size + more, texts[part[-1]]
    if group:
        yield group


def _parts(texts: Sequence[Tokens], group: list[int], most: int) -> Iterator[list[int]]:
    """A group that fits, or halves of it that do."""
    if len(group) == 1 or _size([texts[i] for i in group]) <= most:
        yield group
    else:
        half = len(group) // 2
        yield from _parts(texts, group[:half], most)
        yield from _parts(texts, group[half:], most)


def _size(texts: list[Tokens]) -> int:
    """Tokens in the tree of sorted texts."""
    pairs = itertools.pairwise([(), *texts])
    return sum(len(text) - common_length(before, text) for before, text in pairs)
