"""Perplexity and bits per byte of any source of text, by domain, long documents in windows.

A document is BOS and its tokens.  The model reads at most ``window`` tokens at once.  Every token
but BOS is predicted once, and those of the second window and later ones from at least
``window - stride`` tokens before them.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int
from rich.markup import escape

from dynmoe_jax import config
from dynmoe_jax.console import console, stage, titled_table
from dynmoe_jax.data import Tokenizer
from dynmoe_jax.data.sources.document import Broken, Document
from dynmoe_jax.evaluation.documents import name_left_out, wanted
from dynmoe_jax.evaluation.harness.answers import AnswerFile
from dynmoe_jax.evaluation.harness.ask import ask
from dynmoe_jax.evaluation.scoring.requests import Answer, Request
from dynmoe_jax.evaluation.scoring.scoring import Scorer
from dynmoe_jax.runs.formatting import decimals, printable

FILE_NAME = "perplexity.json"
_TOKENS_AT_ONCE = 1 << 18


@dataclasses.dataclass
class DomainText:
    """The sums of one domain.

    Attributes:
      documents: read.
      tokens: predicted.
      bytes: of their text in UTF-8.
      nll: negative log-likelihood of all of it, nats.
      experts_N: experts used in each MoE layer, summed over the tokens that predicted.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    nll: float = 0.0
    experts_N: Int[np.ndarray, "N"] | None = None

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """exp of the loss: it depends on the tokenizer."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Compares models whatever their tokenizers are."""
        return self.nll / math.log(2) / max(1, self.bytes)

    @property
    def experts_by_layer(self) -> list[float]:
        """Mean experts per token; empty in a dense model."""
        return [] if self.experts_N is None else (self.experts_N / max(1, self.tokens)).tolist()

    def __add__(self, other: "DomainText") -> "DomainText":
        pair = [part.experts_N for part in (self, other) if part.experts_N is not None]
        return DomainText(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.nll + other.nll,
            sum(pair) if pair else None,
        )


def windows(tokens: Sequence[int], window: int, stride: int) -> Iterator[Request]:
    """A document's requests.

    Args:
      tokens: BOS and what follows.
      window: tokens read at once, at the most.
      stride: tokens predicted by each window after the first.
    """
    done, last = 0, len(tokens) - 1  # the token at 0 is not predicted
    while done < last:
        end = min(done + (stride if done else window), last)
        # Of what is read, only those that predict count: each token then counts once.
        part = tuple(tokens[max(0, end - window) : end + 1])
        yield Request(part, scored=end - done, counted=end - done)
        done = end


def measure(
    documents: Iterable[Document | Broken],
    scorer: Scorer,
    tokenizer: Tokenizer,
    answers: AnswerFile,
    *,
    stride: int,
    limit: int | None = None,
) -> dict[str, DomainText]:
    """Sums by domain.

    Args:
      documents: of a source; what is broken is counted and said.
      scorer: of the model; its ``max_length`` is the window.
      tokenizer: of the model.
      answers: where answers are kept.
      stride: tokens predicted by each window after the first.
      limit: documents of each domain at the most.
    """
    found: dict[str, DomainText] = {}
    broken: list[Broken] = []
    with stage("Scoring documents", unit="tokens") as shown:
        for part in _parts(wanted(documents, broken, limit), tokenizer):
            asked, owners = [], []
            for document, tokens in part:
                parts = list(windows(tokens, scorer.max_length, stride))
                asked += parts
                owners += [document.domain] * len(parts)
                size = len(document.text.encode())
                before = found.get(document.domain, DomainText())
                found[document.domain] = before + DomainText(1, len(tokens) - 1, size)
            given = ask(
                scorer, answers, asked, lambda i, asked=asked: shown.advance(asked[i].scored)
            )
            for domain, answer in zip(owners, given, strict=True):
                found[domain] += _text_of(answer)
    name_left_out(broken)
    return found


def _text_of(answer: Answer) -> DomainText:
    experts = answer.experts_N if len(answer.experts_N) else None
    return DomainText(nll=-answer.log_prob, experts_N=experts)


def _parts(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[list[tuple[Document, list[int]]]]:
    """Documents with their tokens, as many at a time as memory is sure to hold."""
    part, size = [], 0
    for document in documents:
        tokens = [tokenizer.bos_id, *tokenizer.encode(document.text).tolist()]
        part.append((document, tokens))
        size += len(tokens)
        if size >= _TOKENS_AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part


def print_perplexity(found: dict[str, DomainText]) -> None:
    """A row for each domain, and one for all of them."""
    total = sum(found.values(), DomainText())
    moe = total.experts_N is not None
    table = titled_table("Text")
    table.add_column("domain", overflow="fold", min_width=8)
    columns = ("documents", "tokens", "nats/\ntoken", "perplexity", "bits/\nbyte")
    for name in columns + ("experts/\ntoken",) * moe:
        table.add_column(name, justify="right", no_wrap=True)
    for name, domain in itertools.chain(found.items(), [("all", total)]):
        if domain is total:
            table.add_section()
        cells = [
            f"{domain.documents:,}",
            f"{domain.tokens:,}",
            decimals(domain.loss, 3),
            decimals(domain.perplexity, 2),
            decimals(domain.bits_per_byte, 4),
        ]
        if moe:
            cells.append(decimals(float(np.mean(domain.experts_by_layer)), 2))
        style = "bold" if domain is total else "none"
        table.add_row(escape(printable(name)), *cells, style=style)
    console.print()
    console.print(table)


def to_record(found: dict[str, DomainText], window: int, stride: int) -> dict:
    """Contents of ``perplexity.json``."""

    def record(domain: DomainText) -> dict:
        return {
            "documents": domain.documents,
            "tokens": domain.tokens,
            "bytes": domain.bytes,
            "loss": domain.loss,
            "perplexity": domain.perplexity,
            "bits_per_byte": domain.bits_per_byte,
            "experts_per_token_by_layer": domain.experts_by_layer,
        }

    total = sum(found.values(), DomainText())
    domains = {name: record(domain) for name, domain in found.items()}
    return {"window": window, "stride": stride, "all": record(total), "domains": domains}


def check_stride(window: int, stride: int) -> None:
    """Raises ConfigError unless windows can follow each other by ``stride``."""
    if not 1 <= stride <= window:
        raise config.ConfigError(
            f"--stride={stride} must be at least 1 and at most the window, which is {window}."
        )
