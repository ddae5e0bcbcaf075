"""Interface of rules that move the weights of domains."""

import abc
from collections.abc import Mapping


class Reweighting(abc.ABC):
    """A rule: a frozen dataclass whose fields are its settings.

    It is asked after each held-out evaluation of a run.  The weights are its state: they lie with
    the position in the data, in the checkpoint.

    Attributes:
      reference: held-out losses by domain, as ``'code=1.8,prose=2.9'``, or the folder of a finished
        run that has them; empty where the rule needs none.
    """

    reference: str = ""

    @abc.abstractmethod
    def __call__(
        self,
        weights: Mapping[str, float],
        losses: Mapping[str, float],
        reference: Mapping[str, float],
    ) -> dict[str, float]:
        """The next weights, which add up to 1.

        Args:
          weights: shares of the rows by domain until now; they add up to 1, and none is 0.
          losses: held-out losses of these domains, in nats per token.
          reference: those that the run is compared with; empty where the rule needs none.
        """
