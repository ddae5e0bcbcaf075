"""Interface of regularizers, which disturb routing in training alone, and their registry.

Axis legend: T tokens, D model width, E experts.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

from jaxtyping import Array, Float

from dynmoe_jax.routing.router import RouterInput

Scores = Callable[[Float[Array, "T D"]], Float[Array, "T E"]]
"""The router logits of tokens."""


class Regularizer(abc.ABC):
    """A disturbance of routing in training: a frozen dataclass whose fields are its settings.

    Works with any router: it changes what the router is given, and may take back what it chose.
    Regularizers follow each other in the order of ``config.model.moe.regularizers``.  Evaluation
    and generation never call them, so they are no part of the model.

    Attributes:
      reads: as of a router, see :attr:`dynmoe_jax.routing.router.Router.reads`.
    """

    reads: ClassVar[frozenset[str]] = frozenset()

    def obstacle(self, num_experts: int, fewest: int) -> str | None:
        """Says why the settings do not fit: "NAME=VALUE must …".

        Args:
          num_experts: of the layer.
          fewest: experts that its router takes for a token at the least.
        """
        return None

    @abc.abstractmethod
    def __call__(self, given: RouterInput, scores: Scores) -> RouterInput:
        """The input that the router gets in place of ``given``.

        Args:
          given: the input, with the arrays that :attr:`reads` names.
          scores: computes logits of other tokens than those of ``given``.
        """

    def behind(self, routing: Any, given: RouterInput) -> Any:
        """Takes back a part of the router's choice; losses and statistics read what is left."""
        return routing
