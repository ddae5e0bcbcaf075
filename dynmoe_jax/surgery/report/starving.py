"""Tokens that every expert of a result was given, and experts that got next to none.

Such an expert learns little, and what is measured of it rests on few tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

STARVING = 0.1
"""Share of an even share below which an expert is named."""


@dataclasses.dataclass(frozen=True)
class Given:
    """Tokens of the experts of one layer.

    Attributes:
      layer: its number.
      tokens: that chose each expert.
    """

    layer: int
    tokens: Sequence[int]

    @property
    def even(self) -> float:
        """Tokens of each if all had equally many."""
        return sum(self.tokens) / len(self.tokens)

    @property
    def fewest(self) -> int:
        """Number of the expert with the fewest."""
        return min(range(len(self.tokens)), key=self.tokens.__getitem__)

    @property
    def most(self) -> int:
        """Number of the expert with the most."""
        return max(range(len(self.tokens)), key=self.tokens.__getitem__)

    @property
    def starving(self) -> list[int]:
        """Numbers of the experts with less than :data:`STARVING` of an even share."""
        return [e for e, own in enumerate(self.tokens) if own < STARVING * self.even]


def tokens_by_expert(side: Mapping[str, Any], tokens: int) -> list[Given]:
    """The MoE layers of one side of a record.

    Args:
      side: whose ``load`` has the share of tokens that chose each expert.
      tokens: that were measured.
    """
    return [
        Given(int(layer), [round(share * tokens) for share in shares])
        for layer, shares in side["load"].items()
    ]


def calibrated_by_expert(calibration: Mapping[str, Any]) -> list[Given]:
    """The MoE layers of the first parent, with the tokens that statistics of experts are of.

    Args:
      calibration: what the record says of it.
    """
    return [Given(int(layer), own) for layer, own in calibration["by_expert"].items()]
