"""Interface of the steps of a recipe, and the registry of their kinds.

A step says what it is made of; its key, a digest of that and of the keys of the steps that it
needs, names its folder.  So a step is done again exactly if something that it depends on has
changed, and what was made before stays.
"""

import abc
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from dynmoe_jax import config
from dynmoe_jax.data.sources.registry import parse_sources, source_identity
from dynmoe_jax.registry import Registry

STEPS = Registry("step")

STEPS_FOLDER = "steps"
"""Folder of the folders of all steps, in that of a recipe."""


_CHECKED = {"tuple", "Step", "Operation", "Config", "Options", "NoneType"}
"""Names of types that fields of recipes and steps are checked for."""


def check_types(made: Any, called: str) -> None:
    """Raises ConfigError where a dataclass holds something else than it declares.

    Args:
      made: the dataclass.
      called: how the sentence calls it.
    """
    for field in dataclasses.fields(made):
        kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
        allowed = [(get_origin(kind) or kind).__name__ for kind in kinds]
        value = getattr(made, field.name)
        # By name: classes of settings are made anew with every kind that is registered.
        if not _CHECKED.issuperset(allowed) or {c.__name__ for c in type(value).__mro__} & {
            *allowed
        }:
            continue
        wanted = " or ".join(name for name in allowed if name != "NoneType")
        given = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        article = "an" if wanted[0] in "AEIOU" else "a"
        remedy = "; that of a single x is (x,)" if wanted == "tuple" else ""
        remedy = f"; call it: {value.__name__}()" if isinstance(value, type) else remedy
        raise config.ConfigError(
            f"{field.name} of {called} must be {article} {wanted}, not {given}{remedy}."
        )


Place = Callable[["Step"], Path]
"""Folder of a step."""


@dataclasses.dataclass(frozen=True)
class Price:
    """Price of a step, by arithmetic.

    Attributes:
      flops: of training.
      seconds: on this machine, roughly.
      stored_bytes: that stay on disk.
    """

    flops: float = 0.0
    seconds: float = 0.0
    stored_bytes: float = 0.0

    def __add__(self, other: "Price") -> "Price":
        """The price of both, one after the other."""
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Price(*map(sum, zip(mine, theirs, strict=True)))


@dataclasses.dataclass(frozen=True)
class Result:
    """Figures of a step that is done; NaN or None where it has none.

    Attributes:
      bits_per_byte: on held-out text.
      bits_added: what was added to those of the first step that it needs, on the same text; None
        where the two cannot be told apart so.
      by_domain: the same by domain: what was added, where that is told.
      experts_per_token: mean over held-out tokens and layers.
      curve: (steps of training, held-out bits per byte) while it was trained.
      parameters: of its model.
      active_parameters: that a token uses.
      sample: what the model writes, after its prompt.
      page: file of its own page, relative to its folder.
      note: a line for people.
      efforts: (FLOPs of a forward pass per token, bits per byte) of the model at several efforts,
        by the name of a rule.
      exact: share of responses to instructions that are matched exactly, by task; ``all`` of them.
    """

    bits_per_byte: float = float("nan")
    bits_added: float | None = None
    by_domain: Mapping[str, float] = dataclasses.field(default_factory=dict)
    experts_per_token: float = float("nan")
    curve: tuple[tuple[int, float], ...] = ()
    parameters: int | None = None
    active_parameters: float | None = None
    sample: tuple[str, str] | None = None
    page: str = ""
    note: str = ""
    exact: Mapping[str, float] = dataclasses.field(default_factory=dict)
    efforts: Mapping[str, tuple[tuple[float, float], ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Step(abc.ABC):
    """Step of a recipe: a frozen dataclass, registered in :data:`STEPS`.

    Attributes:
      name: of the step, for people and in the name of its folder.
    """

    name: str

    def __post_init__(self) -> None:
        """Checks what is forgotten most: the comma of a tuple of one, the call of an operation."""
        check_types(self, f"the step {self.name}")

    @property
    def kind(self) -> str:
        """Name that its kind is registered by.

        Raises:
          ConfigError: it is not registered.
        """
        for name, kind in STEPS.items():
            if type(self) is kind:
                return name
        raise config.ConfigError(
            f"The step {self.name} is a {type(self).__name__}, which is not registered; decorate "
            "it with STEPS.register."
        )

    @property
    @abc.abstractmethod
    def needs(self) -> tuple["Step", ...]:
        """Steps that must be done before."""

    @abc.abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """All that decides what comes out, but the steps that it needs; as JSON can hold it."""

    @abc.abstractmethod
    def price(self) -> Price:
        """The price, before anything is read."""

    @abc.abstractmethod
    def message(self, place: Place, text: Path) -> Mapping[str, Any]:
        """The job that a worker is given, see :meth:`do`.

        Args:
          place: folder of a step.
          text: folder in which text is prepared for all steps.
        """

    @staticmethod
    @abc.abstractmethod
    def do(job: Mapping[str, Any], folder: Path) -> int:
        """Does it in a worker process; returns an exit code, not 0 where it was stopped."""

    @property
    def settings(self) -> config.Config | None:
        """Settings of the model that its folder holds; None where it holds none."""
        return None

    def is_done(self, folder: Path) -> bool:
        """Whether its folder holds all of it."""
        return folder.is_dir()

    def share_done(self, folder: Path) -> float:
        """Part that is done, from 0 to 1."""
        return float(self.is_done(folder))

    @abc.abstractmethod
    def result(self, folder: Path) -> Result:
        """Its figures, once it is done."""

    @functools.cached_property
    def key(self) -> str:
        """Digest of all that decides what comes out."""
        facts = [self.kind, self.facts(), [step.key for step in self.needs]]
        text = json.dumps(facts, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def folder_name(self) -> str:
        """Name of its folder."""
        return f"{self.name}-{self.key[:8]}"


def files_of(sources: str) -> list[Mapping[str, Any]]:
    """Identity of what sources of text hold now, of those that files or a data set stand behind.

    Raises:
      DataError: a source is not there.
    """
    found = map(source_identity, parse_sources(sources))
    return [each for each in found if each["files"] or "dataset" in each]


def model_of(step: Step, for_what: str) -> config.Config:
    """Settings of the model of a step that another one needs.

    Raises:
      ConfigError: its folder holds no model.
    """
    if step.settings is None:
        raise config.ConfigError(
            f"The step {for_what} needs a model, and {step.name} makes none; name a training or an "
            "operation."
        )
    return step.settings
