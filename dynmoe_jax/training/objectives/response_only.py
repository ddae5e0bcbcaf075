"""Language model of responses alone, for instruction tuning: prompts are read, and not learned.

Flan-MoE (arXiv 2305.14705) trains like this.

Axis legend: B batch, L positions.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax import config
from dynmoe_jax.data import Tokenizer
from dynmoe_jax.data.chat import responses
from dynmoe_jax.fields import run_setting
from dynmoe_jax.registry import OBJECTIVES
from dynmoe_jax.training.objectives.language_model import LanguageModel
from dynmoe_jax.training.objectives.objective import Batch, valid


@OBJECTIVES.register("response_only")
@dataclasses.dataclass(frozen=True)
class ResponseOnly(LanguageModel):
    """Mean cross entropy of the tokens of responses.

    Documents of the source ``instructions`` know where their responses are.  In those of other
    sources a response stands behind a mark, up to another one, which is learned with it, so that
    the model learns to end; without the first mark there is none.
    """

    arrays: ClassVar[tuple[str, ...]] = (responses.NAME,)

    begin: str = run_setting(
        "<|assistant|>",
        "text behind which a response begins, in documents that are no instructions",
    )
    end: str = run_setting("", "text that ends such a response; empty = the end of the document")

    def prepared(self, tokenizer: Tokenizer) -> "ResponseOnly":
        """The objective with the marks as ids.

        Raises:
          ConfigError: a mark is no text to the tokenizer.
        """
        begin = tuple(int(i) for i in tokenizer.encode(self.begin))
        if not begin:
            raise config.ConfigError(
                f"config.train.response_only.begin={self.begin!r} has no tokens; name the text "
                "that stands before every response."
            )
        end = tuple(int(i) for i in tokenizer.encode(self.end)) if self.end else ()
        return _WithIds(self.begin, self.end, begin, end)

    @property
    def marks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(ids of the first mark, ids of the second); placeholders until they are prepared."""
        return (0,), (1,) if self.end else ()

    def loss_weights(self, batch: Batch) -> Float[Array, "B L"]:
        """1 where the next token belongs to a response."""
        begin, end = self.marks
        tokens_BL, segment_BL = batch["tokens"], batch["segment_ids"]
        position_L = jnp.arange(tokens_BL.shape[1])
        new_BL = jnp.pad(segment_BL[:, 1:] != segment_BL[:, :-1], ((0, 0), (1, 0)))
        first_BL = _latest(new_BL, position_L, otherwise=0)
        begun_BL = _latest(_ends_here(tokens_BL, begin, first_BL), position_L)
        ended_BL = _latest(_ends_here(tokens_BL, end, first_BL), position_L)
        inside_BL = (begun_BL >= first_BL) & (begun_BL > ended_BL)
        if (kind_BL := batch.get(responses.NAME)) is not None:
            told_BL = kind_BL == responses.LEARNED
            inside_BL = jnp.where(kind_BL == responses.UNKNOWN, inside_BL, told_BL)
        return (inside_BL & valid(batch)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class _WithIds(ResponseOnly):
    """The objective of one tokenizer."""

    begin_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()

    @property
    def marks(self):
        """(ids of the first mark, ids of the second)."""
        return self.begin_ids, self.end_ids


def _ends_here(
    tokens_BL: Int[Array, "B L"], mark: tuple[int, ...], first_BL: Int[Array, "B L"]
) -> Bool[Array, "B L"]:
    """Whether the last token of a mark stands here, all of it in one document."""
    if not mark:
        return jnp.zeros(tokens_BL.shape, bool)
    position_L = jnp.arange(tokens_BL.shape[1])
    here_BL = position_L - (len(mark) - 1) >= first_BL
    for back, token in enumerate(reversed(mark)):
        here_BL &= jnp.roll(tokens_BL, back, axis=1) == token
    return here_BL


def _latest(
    holds_BL: Bool[Array, "B L"], position_L: Int[Array, "L"], otherwise: int = -1
) -> Int[Array, "B L"]:
    """The last position up to each one where something holds."""
    return jax.lax.cummax(jnp.where(holds_BL, position_L, otherwise), axis=1)
