"""Responses to instructions: how often a model says exactly them, and their bits per byte, by task.

What is asked for is a conversation up to its last response; the response is what the data has, with
what ends it.  It is matched exactly if each of its tokens is the most probable one, which is what a
greedy text would be.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np
from rich.markup import escape

from dynmoe_jax.console import console, stage, titled_table, warn
from dynmoe_jax.data import DataError, Tokenizer
from dynmoe_jax.data.chat.responses import LEARNED, UNKNOWN, kinds_of_targets
from dynmoe_jax.data.sources.document import Broken, Document
from dynmoe_jax.evaluation.documents import name_left_out, wanted
from dynmoe_jax.evaluation.harness.answers import AnswerFile
from dynmoe_jax.evaluation.harness.ask import ask
from dynmoe_jax.evaluation.scoring.requests import Request
from dynmoe_jax.evaluation.scoring.scoring import Scorer
from dynmoe_jax.runs.formatting import decimals, printable

FILE_NAME = "instructions.json"


@dataclasses.dataclass
class TaskScore:
    """Sums over the responses of a task.

    Attributes:
      responses: how many there are.
      exact: how many are matched exactly.
      bytes: of their text in UTF-8, what ends them not counted.
      nll: negative log-likelihood of all of them, nats.
    """

    responses: int = 0
    exact: int = 0
    bytes: int = 0
    nll: float = 0.0

    @property
    def share_exact(self) -> float:
        """Share of the responses that are matched exactly."""
        return self.exact / max(1, self.responses)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of responses, prompts left out."""
        return self.nll / math.log(2) / max(1, self.bytes)

    def __add__(self, other: "TaskScore") -> "TaskScore":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return TaskScore(*(one + more for one, more in pairs))


def measure(
    documents: Iterable[Document | Broken],
    scorer: Scorer,
    tokenizer: Tokenizer,
    answers: AnswerFile,
    *,
    limit: int | None = None,
) -> dict[str, TaskScore]:
    """Scores by task.

    Args:
      documents: conversations; what is broken, or is none, is counted and said.
      scorer: of the model.
      tokenizer: of the model.
      answers: where answers are kept.
      limit: conversations of each task at the most.
    """
    requests, owners, broken = [], [], []
    for document in wanted(_conversations(documents), broken, limit):
        request, size = _request(document, tokenizer)
        requests.append(request)
        owners.append((document.domain, size))
    if broken:
        name_left_out(broken)
        warn(f"{len(broken):,} records are no conversation, and are left out.")
    found: dict[str, TaskScore] = {}
    with stage("Scoring responses", total=len(requests), unit="responses") as shown:
        given = ask(scorer, answers, requests, lambda _: shown.advance())
    for (task, size), answer in zip(owners, given, strict=True):
        score = TaskScore(1, int(answer.greedy), size, -answer.log_prob)
        found[task] = found.get(task, TaskScore()) + score
    return found


def _conversations(documents: Iterable[Document | Broken]) -> Iterator[Document | Broken]:
    """Yields documents, those without a response as broken ones."""
    for document in documents:
        if isinstance(document, Document) and not document.responses:
            yield Broken(document.origin, "it has no response")
        else:
            yield document


def _request(document: Document, tokenizer: Tokenizer) -> tuple[Request, int]:
    """(the request that asks for the last response, bytes of it)."""
    ids_n = tokenizer.encode(document.text)
    example = {"responses": document.responses.split(" ")[-1].encode()}
    kinds_n = kinds_of_targets(example, document.text, ids_n, tokenizer.encode)
    assert UNKNOWN not in kinds_n
    (scored,) = np.nonzero(kinds_n == LEARNED)
    tokens = [tokenizer.bos_id, *ids_n.tolist(), tokenizer.eos_id]
    # Targets are one token later than what predicts them.
    end = int(scored[-1]) + 2
    begin, stop = map(int, example["responses"].decode().split(":"))
    size = len(document.text[begin:stop].encode())
    return Request(tuple(tokens[:end]), len(scored)), size


def print_scores(found: dict[str, TaskScore]) -> None:
    """A row for each task, and one for all of them."""
    total = sum(found.values(), TaskScore())
    table = titled_table("Responses")
    table.add_column("task", overflow="fold", min_width=8)
    for name in ("responses", "exact", "bits/\nbyte"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, score in itertools.chain(found.items(), [("all", total)]):
        if score is total:
            table.add_section()
        cells = (f"{score.responses:,}", f"{100 * score.share_exact:.1f} %")
        style = "bold" if score is total else "none"
        table.add_row(
            escape(printable(name)), *cells, decimals(score.bits_per_byte, 4), style=style
        )
    console.print()
    console.print(table)


def to_record(found: dict[str, TaskScore]) -> dict:
    """Contents of ``instructions.json``.

    Raises:
      DataError: there is no response.
    """
    if not found:
        raise DataError("--instructions names no conversation with a response; name others.")

    def record(score: TaskScore) -> dict:
        means = {"exact": score.share_exact, "bits_per_byte": score.bits_per_byte}
        return {"responses": score.responses, "bytes": score.bytes, **means}

    tasks = {name: record(score) for name, score in found.items()}
    return {"all": record(sum(found.values(), TaskScore())), "tasks": tasks}
