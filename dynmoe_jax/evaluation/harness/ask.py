"""Answers from the file, and from the model for what is not there."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dynmoe_jax.data import Tokenizer
from dynmoe_jax.data.tokenizers.endings import ends_of
from dynmoe_jax.evaluation.harness.answers import AnswerFile
from dynmoe_jax.evaluation.scoring.requests import Answer, Request
from dynmoe_jax.evaluation.scoring.scoring import Scorer
from dynmoe_jax.evaluation.scoring.tree_writing import Prompt, TreeWriter, Written
from dynmoe_jax.inference.stops import Stops

OnAnswer = Callable[[int], None]
"""Told the index of each request as its answer is there."""


@dataclasses.dataclass(frozen=True)
class TextPrompt:
    """A text to continue greedily.

    Attributes:
      tokens: of the text.
      limit: tokens to write at the most.
      stops: strings that end what is written.
    """

    tokens: tuple[int, ...]
    limit: int
    stops: tuple[str, ...]


def ask(
    scorer: Scorer, answers: AnswerFile, requests: Sequence[Request], on_answer: OnAnswer
) -> list[Answer]:
    """An answer to each request; what is asked twice is computed once.

    Args:
      scorer: of the model.
      answers: where answers are kept.
      requests: what is asked.
      on_answer: see :data:`OnAnswer`.
    """
    keys = [answers.key("score", r.tokens, r.scored, r.counted) for r in requests]

    def compute(indices: list[int]) -> Iterator[list[tuple[int, dict]]]:
        for batch in scorer.answer([requests[i] for i in indices]):
            yield [(i, _record(answer, log_prob=answer.log_prob, greedy=answer.greedy))
                   for i, answer in batch]  # fmt: skip

    found = _found(answers, keys, compute, on_answer)
    return [Answer(f["log_prob"], f["greedy"], *_experts(f)) for f in found]


def ask_texts(
    writer: TreeWriter,
    tokenizer: Tokenizer,
    answers: AnswerFile,
    prompts: Sequence[TextPrompt],
    on_answer: OnAnswer,
) -> list[Written]:
    """Writes a text after each prompt; what is asked twice is computed once.

    Args:
      writer: of the model.
      tokenizer: of the model.
      answers: where answers are kept.
      prompts: what is asked.
      on_answer: see :data:`OnAnswer`.
    """
    ends = ends_of(tokenizer)
    keys = [answers.key("write up to", p.tokens, p.limit, p.stops, ends) for p in prompts]

    def compute(indices: list[int]) -> Iterator[list[tuple[int, dict]]]:
        asked = [
            Prompt(p.tokens, p.limit, _ends_at(tokenizer, p.stops))
            for p in (prompts[i] for i in indices)
        ]
        for batch in writer.write(asked):
            yield [(i, _record(written, ids=written.ids)) for i, written in batch]

    found = _found(answers, keys, compute, on_answer)
    return [Written(f["ids"], *_experts(f)) for f in found]


def _ends_at(tokenizer: Tokenizer, stops: tuple[str, ...]) -> Callable[[list[int]], int | None]:
    """(tokens) -> how many of them there are when a string has come that ends the text."""

    wanted = Stops(stops, tokenizer)

    def holds(ids: list[int]) -> bool:
        return wanted.end(wanted.read(ids)) is not None

    def end(ids: list[int]) -> int | None:
        return next(n for n in range(1, len(ids) + 1) if holds(ids[:n])) if holds(ids) else None

    return end


def _found(
    answers: AnswerFile,
    keys: Sequence[str],
    compute: Callable[[list[int]], Iterable[list[tuple[int, dict]]]],
    on_answer: OnAnswer,
) -> list[dict[str, Any]]:
    """The record under each key, computed and kept where it is not there."""
    waiting: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        if answers.get(key) is None:
            waiting.setdefault(key, []).append(i)
        else:
            on_answer(i)
    names = list(waiting)
    for batch in compute([indices[0] for indices in waiting.values()]) if names else ():
        answers.put((names[i], record) for i, record in batch)
        for i, _ in batch:
            for index in waiting[names[i]]:
                on_answer(index)
    return [answers.get(key) for key in keys]


def _record(answer: Answer | Written, **values: Any) -> dict[str, Any]:
    """Record of an answer, as it is kept; a dense model has no experts to keep."""
    by_token = answer.experts_L.tolist() if len(answer.experts_N) else []
    return {**values, "experts_N": answer.experts_N.tolist(), "experts_L": by_token}


def _experts(record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array(record[name], np.int64) for name in ("experts_N", "experts_L"))
