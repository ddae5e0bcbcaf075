"""Interface of operations, and their registry.

An operation says what the settings of its result are and how each of its arrays is made of its
parents'.  It reads no file and writes none: whoever runs it (:mod:`.perform`) asks for one array at
a time, so no model is ever in memory as a whole.
"""

import abc
import dataclasses
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from dynmoe_jax import config
from dynmoe_jax.calibration.pricing import SAMPLES
from dynmoe_jax.edits.places import Place
from dynmoe_jax.edits.roles import Role
from dynmoe_jax.registry import Registry

OPERATIONS = Registry("operation")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Statistics that an operation asks of its first parent, on training text.

    Attributes:
      names: of the statistics, see :data:`dynmoe_jax.calibration.STATISTICS`.
      layers: numbers of those that they are wanted of; None: all.
      clusters: of texts that are alike, with statistics of each; 1: all text is one.
      samples: tokens of which there are samples.
      model: settings that the parent is computed with; None: its own.
    """

    names: frozenset[str] = frozenset()
    layers: tuple[int, ...] | None = None
    clusters: int = 1
    samples: int = SAMPLES
    model: config.Model | None = None


@dataclasses.dataclass(frozen=True)
class Given:
    """All that an array of the result is made of.

    Attributes:
      model: settings of the result.
      shape: of the array.
      role: whether it is a parameter, or a moment of one.
      seed: of all that is drawn.
      parents: settings of the models that there are to read from.
      read_from: (number of a parent, place, role) -> its array, float32.
      memo: of what several arrays are made of, by key; see :meth:`once`.
      statistic: (name, number of a layer) -> the array, of those that the operation wanted; with an
        axis of clusters in front where it wanted some.
      findings: numbers by layer and name that the record is to hold, filled by the operation.
    """

    model: config.Model
    shape: tuple[int, ...]
    role: Role
    seed: int
    parents: tuple[config.Model, ...]
    read_from: Callable[[int, Place, Role], np.ndarray]
    memo: dict[Hashable, Any] = dataclasses.field(default_factory=dict)
    statistic: Callable[[str, int], np.ndarray] | None = None
    findings: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def num_parents(self) -> int:
        """Number of models that there are to read from."""
        return len(self.parents)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Result of ``make``, made for the first array that asks, and kept for others."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def parameters(self) -> "Given":
        """The same for parameters, whatever the role: a choice is made from those."""
        return dataclasses.replace(self, role=Role.PARAMETER)

    def read(self, place: Place, parent: int = 0) -> np.ndarray:
        """An array of a parent, in the same role."""
        return self.read_from(parent, place, self.role)

    def random(self, place: Place, purpose: str = "") -> np.random.Generator:
        """Random numbers of a place, the same for all roles, and whoever asks first."""
        named = f"{place.name}:{purpose}".encode()
        numbers = [-1 if x is None else x for x in (place.layer, place.expert)]
        return np.random.default_rng([self.seed, zlib.crc32(named), *(x + 1 for x in numbers)])

    def normal(self, place: Place, std: float, purpose: str = "") -> np.ndarray:
        """Draws of N(0, std^2) in the array's shape."""
        values = self.random(place, purpose).standard_normal(self.shape, np.float32)
        return np.float32(std) * values


class Operation(abc.ABC):
    """An operation: a frozen dataclass whose fields are its settings.

    Derive from it, write :meth:`result` and :meth:`array`, and register it: command, help, checks,
    plan, provenance and the table in the documentation follow.

    Attributes:
      parents: fewest and most models that it takes; None: no bound.
      paper: where it comes from, in a few words.
      exact: when it keeps the function, in a few words; :meth:`promise` says it of settings.
      statistics: names of those that it may need, of a calibration; :meth:`wanted` says it of
        settings.
      streamed: whether an array needs no more than a few arrays of its parents.
      choices: names of findings that are one number by who chose, its own first, then controls.
      takes_masks: whether its parents may have masks below 1.
      found: says what its findings are, in a sentence or two.
    """

    parents: ClassVar[tuple[int, int | None]] = (1, 1)
    paper: ClassVar[str] = ""
    exact: ClassVar[str] = "no"
    statistics: ClassVar[frozenset[str]] = frozenset()
    streamed: ClassVar[bool] = True
    choices: ClassVar[tuple[str, ...]] = ()
    takes_masks: ClassVar[bool] = False
    found: ClassVar[str] = ""

    def wanted(self, parents: Sequence[config.Config]) -> Wanted:
        """The statistics that it needs."""
        return Wanted()

    def promise(self, parents: Sequence[config.Config]) -> float | None:
        """Largest difference of logits, relative to the largest one where that is above 1; None
        where it changes the function."""
        return None

    @property
    def wanted_experts(self) -> float:
        """Mean experts of a token that p of a top-p result is moved to; 0: it stays."""
        return 0.0

    @abc.abstractmethod
    def result(self, parents: Sequence[config.Config]) -> config.Config:
        """The settings of the result.

        Raises:
          ConfigError: a setting does not fit, or a parent is none that it can work on.
        """

    @abc.abstractmethod
    def array(self, place: Place, given: Given) -> np.ndarray:
        """An array of the result, a parameter or moments of one, as ``given.role`` says.

        Args:
          place: where it stands in the result.
          given: the parents, and more.
        """

    def remarks(self, parents: Sequence[config.Config]) -> list[str]:
        """Sentences that a user should read about the result, such as that experts are equal."""
        return []


def settings_of(operation: Operation) -> Mapping[str, object]:
    """The settings of an operation by name, as they are stored."""
    return {field.name: getattr(operation, field.name) for field in dataclasses.fields(operation)}
