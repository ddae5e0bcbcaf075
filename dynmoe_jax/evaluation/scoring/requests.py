"""Requests to a model, and its answers."""

import dataclasses

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Request:
    """A text whose last tokens are to be scored.

    The model reads all tokens but the last one, which is only predicted.

    Attributes:
      tokens: context and continuation; at least one token more than ``scored``.
      scored: how many tokens at the end have their probabilities asked for.
      counted: how many tokens at the end of those read count for the experts used; None: all.
    """

    tokens: tuple[int, ...]
    scored: int
    counted: int | None = None

    @property
    def read(self) -> tuple[int, ...]:
        """The tokens that the model reads."""
        return self.tokens[:-1]


def in_parts(request: Request, window: int) -> list[Request]:
    """Requests that score each of a request's tokens once, and of which each fits into a window.

    Args:
      request: what is asked.
      window: tokens read at once.

    Returns:
      the request itself where all that it scores fits (its beginning may not); otherwise each part
      scores half a window, from at least half a window before it, as far as there is so much.
    """
    if request.scored <= window:
        return [request]
    parts, stride, last = [], max(1, window // 2), len(request.tokens) - 1
    done = last - request.scored
    while done < last:
        end = min(done + stride, last)
        tokens = request.tokens[max(0, end - window) : end + 1]
        parts.append(Request(tokens, end - done, None if not parts else end - done))
        done = end
    return parts


@dataclasses.dataclass(frozen=True)
class Answer:
    """Answer of a model to a request.

    Attributes:
      log_prob: of the scored tokens together, nats.
      greedy: whether each of them was the most probable one.
      experts_N: experts used in each MoE layer, summed over the counted tokens.
      experts_L: experts that each counted token used, summed over the MoE layers.
    """

    log_prob: float
    greedy: bool
    experts_N: Int[np.ndarray, "N"]
    experts_L: Int[np.ndarray, "L"]
