"""Requests in batches of few shapes: trees packed into rows, rows of one length into batches.

Axis legend: B rows, L tokens of a row, T = B L tokens, S scored tokens (those read whose next-token
distribution is wanted), P pairs of a scored token and a token that may follow it.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from dynmoe_jax.evaluation.scoring.prefix_tree import Tree, build_tree, group_texts
from dynmoe_jax.evaluation.scoring.requests import Request

SHORTEST_ROW = 256
"""Tokens.  Rows are SHORTEST_ROW times a power of two long, so few programs are compiled."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One call of the model.

    Attributes:
      tokens: [B, L] token ids; 0 in padding.
      positions: [B, L] of each token in its text.
      ends: [B, L] one past the last token below each, in its row; padding sees itself alone.
      segment_ids: [B, L] 1, and 0 for padding.
      nodes: [T] the scored tokens, as indices into the flattened rows; unused ones are 0.
      num_nodes: S.
      slots: [T] of each pair: which scored token.
      targets: [T] of each pair: which token may follow.
      requests: (index of the request, where its tokens are in the flattened rows, its pairs).
    """

    tokens: Int[np.ndarray, "B L"]
    positions: Int[np.ndarray, "B L"]
    ends: Int[np.ndarray, "B L"]
    segment_ids: Int[np.ndarray, "B L"]
    nodes: Int[np.ndarray, "T"]
    num_nodes: int
    slots: Int[np.ndarray, "T"]
    targets: Int[np.ndarray, "T"]
    requests: list[tuple[int, Int[np.ndarray, "l"], Int[np.ndarray, "p"]]]


@dataclasses.dataclass(frozen=True)
class _PackedTree:
    """A tree of some requests, and where it begins in its row."""

    tree: Tree
    requests: list[int]
    start: int


def make_batches(
    requests: Sequence[Request], batch_tokens: int, alone: bool = False
) -> list[list[list[_PackedTree]]]:
    """Packs requests into batches of rows, longest rows first.

    Args:
      requests: what is asked.
      batch_tokens: tokens of a batch; a text that is longer has a batch of its own.
      alone: every request has a row of its own, for a model whose routers see the earlier tokens of
        a row.

    Returns:
      batches, of rows, of packed trees; :func:`lay_out` makes arrays of one.
    """
    texts = [request.read for request in requests]
    contexts = [len(request.tokens) - request.scored for request in requests]
    trees = []
    groups = group_texts(texts, contexts, most=batch_tokens)
    for group in ([i] for i in range(len(texts))) if alone else groups:
        trees.append((build_tree([texts[i] for i in group]), group))
    trees.sort(key=lambda pair: -len(pair[0].tokens))
    rows: list[list[_PackedTree]] = []
    lengths: list[int] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for tree, group in trees:
        size = len(tree.tokens)
        found = bisect.bisect_left(room, (size, -1))
        if found < len(room) and not alone:
            left, row = room.pop(found)
        else:
            row, left = len(rows), row_length(size)
            rows.append([])
            lengths.append(left)
        rows[row].append(_PackedTree(tree, group, lengths[row] - left))
        bisect.insort(room, (left - size, row))
    batches = []
    for length in sorted(set(lengths), reverse=True):
        members = [row for row, its in zip(rows, lengths, strict=True) if its == length]
        size = max(1, batch_tokens // length)
        batches += [members[i : i + size] for i in range(0, len(members), size)]
    return batches


def row_length(size: int) -> int:
    """L, for a tree of ``size`` tokens."""
    return SHORTEST_ROW << max(0, -(-size // SHORTEST_ROW) - 1).bit_length()


def row_count(rows: int) -> int:
    """B, for the last batch of a length: a power of two, or one and a half of one.

    So few programs are compiled, and little is computed in vain.
    """
    power = 1 << (rows - 1).bit_length()
    return power // 4 * 3 if rows <= power // 4 * 3 else power


def lay_out(
    rows: list[list[_PackedTree]], requests: Sequence[Request], batch_tokens: int
) -> Iterator[Batch]:
    """The arrays of one batch; where rows are missing, their number is :func:`row_count`.

    Yields more than one batch only where there are more pairs than tokens (many continuations of
    one token each).
    """
    length = row_length(max(p.start + len(p.tree.tokens) for p in rows[0]))
    full = max(1, batch_tokens // length)
    shape = (min(full, row_count(len(rows))), length)
    own_1L = np.arange(length, dtype=np.int32)
    tokens, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    ends, segment_ids = np.tile(own_1L + 1, (shape[0], 1)), np.zeros(shape, np.int32)
    found: list[tuple[int, np.ndarray]] = []
    for b, row in enumerate(rows):
        for packed in row:
            tree = packed.tree
            here = b, slice(packed.start, packed.start + len(tree.tokens))
            tokens[here], positions[here] = tree.tokens, tree.depths
            ends[here], segment_ids[here] = tree.ends + packed.start, 1
            paths = (path + b * length + packed.start for path in tree.paths)
            found += zip(packed.requests, paths, strict=True)
    arrays = {
        "tokens": tokens,
        "positions": positions,
        "ends": ends,
        "segment_ids": segment_ids,
    }
    pairs = _Pairs(tokens.size)
    for index, path in found:
        if not pairs.fits(requests[index]):
            yield Batch(**arrays, **pairs.arrays())
            pairs = _Pairs(tokens.size)
        pairs.add(index, path, requests[index])
    yield Batch(**arrays, **pairs.arrays())


class _Pairs:
    """Scored tokens and what may follow them, each once."""

    def __init__(self, most: int):
        self._most = most
        self._slots: dict[int, int] = {}
        self._pairs: dict[tuple[int, int], int] = {}
        self._requests: list = []

    def fits(self, request: Request) -> bool:
        return not self._requests or len(self._pairs) + request.scored <= self._most

    def add(self, index: int, path: np.ndarray, request: Request) -> None:
        pairs = []
        scored = zip(path[-request.scored :], request.tokens[-request.scored :], strict=True)
        for node, target in scored:
            slot = self._slots.setdefault(int(node), len(self._slots))
            pairs.append(self._pairs.setdefault((slot, target), len(self._pairs)))
        self._requests.append((index, path, np.array(pairs)))

    def arrays(self) -> dict:
        """The fields of a Batch that are of scored tokens."""
        nodes, slots, targets = (np.zeros(self._most, np.int32) for _ in range(3))
        nodes[: len(self._slots)] = list(self._slots)
        if self._pairs:
            slots[: len(self._pairs)], targets[: len(self._pairs)] = zip(*self._pairs, strict=True)
        return {
            "nodes": nodes,
            "num_nodes": len(self._slots),
            "slots": slots,
            "targets": targets,
            "requests": self._requests,
        }
