"""Interface of objectives: what training minimises over a batch, besides the routing losses.

Axis legend: B batch, L positions.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from jaxtyping import Array, Bool, Float

from dynmoe_jax import config
from dynmoe_jax.data import BATCH_ARRAYS, LEARNED, Tokenizer
from dynmoe_jax.model import Decoder
from dynmoe_jax.registry import chosen

Batch = dict[str, Array]
"""Arrays [B, L] by name: ``tokens``, ``targets``, ``segment_ids`` (0 = padding), ``positions``, and
``learned``, 1 where the next token is a target, of corrupted text."""


class Objective(abc.ABC):
    """An objective: a frozen dataclass whose fields are its settings.

    Attributes:
      activation_sums: None, or a method (what the nonlinear functions of a dense feed-forward are
        computed of, [B, L, F], whether positions are valid, [B, L]) -> sums over the positions of
        each sequence, [B], by a name that ends in ``_N``.  Those of all dense layers are given to
        :meth:`value` with the others, [N].
      additive: whether the value of a batch is the mean of those of its microbatches, weighted by
        their sums of :meth:`loss_weights`.  If not, the gradient sees the sums of the whole batch
        first.
      arrays: int32 [B, L] that a batch has for it besides those of every batch, if training text
        is read; ``responses`` of :mod:`dynmoe_jax.data.chat.responses` is one.
    """

    activation_sums: ClassVar[Callable[[Any, Array, Array], Mapping[str, Array]] | None] = None
    additive: ClassVar[bool] = True
    arrays: ClassVar[tuple[str, ...]] = ()

    def obstacle(self, model: config.Model) -> str | None:
        """Says why a model cannot be trained so: "SETTING=VALUE must …"."""
        return None

    def prepared(self, tokenizer: Tokenizer) -> "Objective":
        """The objective with what it has to know of the tokenizer.

        Raises:
          ConfigError: a setting means nothing to the tokenizer.
        """
        return self

    def loss_weights(self, batch: Batch) -> Bool[Array, "B L"] | Float[Array, "B L"]:
        """Weight of the loss at each position; padding has none, nor have inputs of corrupted
        text."""
        return valid(batch) & (batch[LEARNED] > 0) if LEARNED in batch else valid(batch)

    @abc.abstractmethod
    def sums(
        self, decoder: Decoder, x_BLD: Float[Array, "B L D"], batch: Batch, loss: config.Loss
    ) -> Mapping[str, Array]:
        """Sums over the positions of a batch; they add up over microbatches.

        Args:
          decoder: the model.
          x_BLD: its normed residual stream.
          batch: the batch.
          loss: settings of the loss.
        """

    @abc.abstractmethod
    def value(self, sums: Mapping[str, Array]) -> tuple[Float[Array, ""], dict[str, Array]]:
        """(the value, its parts by name, for metrics)."""


def batch_arrays(cfg: config.Config) -> tuple[str, ...]:
    """Names of the arrays of a batch of training text, each int32 [B, L]."""
    corrupted = (LEARNED,) if cfg.data.corruption else ()
    return (*BATCH_ARRAYS, *chosen(cfg.train, "objective").arrays, *corrupted)


def valid(batch: Batch) -> Bool[Array, "B L"]:
    """False for padding."""
    return batch["segment_ids"] > 0
