"""Counts of what requests of tasks lose on their way to the model, said at the end."""

import dataclasses
from collections import defaultdict
from typing import Any

CUT = "lost_beginning"
PARTS = "scored_in_parts"
SHORTER = "shorter_answers"
EMPTY = "empty_continuations"
REPLACED = "replaced_characters"

_SENTENCES = {
    CUT: "{task}: {count} of {requests} requests lost their beginning: with its answer, the "
    "longest has {most} tokens, and {room} are read at once (--window).",
    PARTS: "{task}: {count} of {requests} requests have more to score than the {room} tokens that "
    "are read at once (--window), up to {most}; they are scored in parts.",
    SHORTER: "{task}: the answers of {count} of {requests} requests may have {room} tokens, not "
    "{most}: half of what is read at once (--window) is left to the prompt.",
    EMPTY: "{task}: {count} of {requests} requests have nothing to score, which counts as certain.",
    REPLACED: "{task}: {count} of {requests} requests hold lone surrogates, which no encoding has; "
    "they are read as U+FFFD.",
}


@dataclasses.dataclass
class _Count:
    count: int = 0
    most: int = 0


class Remarks:
    """Counts of all tasks.

    Args:
      room: tokens that the model reads at once.
    """

    def __init__(self, room: int):
        self._room = room
        self._requests: dict[str, int] = defaultdict(int)
        self._found: dict[str, dict[str, _Count]] = defaultdict(dict)

    def asked(self, task: str, requests: int = 1) -> None:
        """Counts requests of a task."""
        self._requests[task] += requests

    def add(self, task: str, kind: str, size: int = 0) -> None:
        """Counts a request of a kind.

        Args:
          task: whose it is.
          kind: ``CUT`` and so on.
          size: tokens that it has, or asks for.
        """
        count = self._found[task].setdefault(kind, _Count())
        count.count, count.most = count.count + 1, max(count.most, size)

    def sentences(self) -> list[str]:
        """Sentences for the user, one for each task and kind."""
        return [
            _SENTENCES[kind].format(
                task=task or "the task",
                count=f"{found.count:,}",
                requests=f"{self._requests[task]:,}",
                most=f"{found.most:,}",
                room=f"{max(1, self._room // 2) if kind == SHORTER else self._room:,}",
            )
            for task, kinds in self._found.items()
            for kind, found in kinds.items()
        ]

    def record(self) -> dict[str, Any]:
        """Counts as ``{task: {kind: count}}``, for the results on disk."""
        return {
            task: {kind: found.count for kind, found in kinds.items()}
            for task, kinds in self._found.items()
        }
