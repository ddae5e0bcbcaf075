"""Interface of corruptions: what a piece of a document is turned into before it is learned."""

import abc
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dynmoe_jax.data.tokenizers.api import Tokenizer
from dynmoe_jax.fields import free_setting

LEARNED = "learned"
"""Array of a batch of corrupted text, int32 [B, L]: 1 where the next token is a target."""


class Example(NamedTuple):
    """A piece of a document, corrupted: BOS, inputs and targets stand behind each other in a row.

    Attributes:
      inputs: ids that are read.
      targets: ids that are predicted behind them, and learned.
      taken: ids of the document that it is made of.
    """

    inputs: Int[np.ndarray, "I"]
    targets: Int[np.ndarray, "J"]
    taken: int


Corrupt = Callable[[Int[np.ndarray, "M"], int, np.random.Generator], Example]
"""(ids of a document from somewhere to its end, positions that are left in a row, at least one,
draws) -> an example of the first of these ids, of as many inputs and targets as fit there."""


@dataclasses.dataclass(frozen=True)
class Corruption(abc.ABC):
    """A corruption: a frozen dataclass whose fields are its settings."""

    until_step: int = free_setting(
        0,
        "step with which text as it is begins; may be set or moved while a run is before it; "
        "0 = never",
        unit="steps",
        low=0,
    )

    @property
    def reserved(self) -> tuple[str, ...]:
        """Special tokens that a tokenizer which is trained here has to have for it."""
        return ()

    def obstacle(self) -> str:
        """The setting that cannot be, as "name=value must …"; empty if there is none."""
        return ""

    @abc.abstractmethod
    def prepared(self, tokenizer: Tokenizer) -> Corrupt:
        """The function that makes examples for a tokenizer.

        Raises:
          DataError: the tokenizer lacks the special tokens.
        """
