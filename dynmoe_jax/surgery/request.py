"""What is asked of surgery, and everything that can be known before an array is read."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from dynmoe_jax import config
from dynmoe_jax.fields import free_setting
from dynmoe_jax.surgery.operation import OPERATIONS, Operation
from dynmoe_jax.surgery.parent import Parent, opened_parent
from dynmoe_jax.surgery.text import Source, source_of

AUTO, DEFAULT = -1, 2
MOST_PARAMETERS = 3e8
"""How many texts models write, and up to what size they do so unasked: whole models are loaded."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings that all operations share."""

    data: str = free_setting(
        "", "text to measure with, as config.data.sources; empty = that of the first model"
    )
    tokens: int = free_setting(
        8192,
        "held-out tokens that both models are measured on, and training ones that p is moved on",
        unit="tokens",
        low=1,
    )
    seed: int = free_setting(0, "of all that is drawn", low=0)
    moments: str = free_setting(
        "carry",
        "carry the optimizer's moments over, so that training goes on with them, or reset them",
        choices=("carry", "reset"),
    )
    dtype: str = free_setting(
        "float32",
        "type that parameters are stored in; they are read as float32",
        choices=("float32", "bfloat16"),
    )
    samples: int = free_setting(
        AUTO,
        "texts that both models write from the same prompts, for the page; 0 = none, -1 = "
        f"{DEFAULT} where neither has more than {MOST_PARAMETERS / 1e6:.0f}M parameters",
        unit="texts",
        low=AUTO,
    )


@dataclasses.dataclass(frozen=True)
class Request:
    """An operation on models.

    Attributes:
      operation: what is done.
      parents: folders of the models.
      to: folder of the result.
      options: settings that all operations share.
    """

    operation: Operation
    parents: tuple[Path, ...]
    to: Path
    options: Options = Options()

    @property
    def name(self) -> str:
        """Name of the operation."""
        return next(name for name, kind in OPERATIONS.items() if isinstance(self.operation, kind))


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that nothing speaks against.

    Attributes:
      asked: the request.
      parents: the models, opened.
      cfg: settings of the result.
      source: of the text that both are measured on.
      moments: whether moments are carried over.
      promise: see :meth:`.operation.Operation.promise`.
    """

    asked: Request
    parents: list[Parent]
    cfg: config.Config
    source: Source
    moments: bool
    promise: float | None


@contextlib.contextmanager
def checked(asked: Request) -> Iterator[Job]:
    """Opens the models, and finds out what the result will be.

    Raises:
      ConfigError: something speaks against it.
      CheckpointError: a model cannot be read.
    """
    _check_count(asked)
    if asked.to.exists() and (not asked.to.is_dir() or any(asked.to.iterdir())):
        raise config.ConfigError(f"--to={asked.to} is not empty; name another folder.")
    with contextlib.ExitStack() as opened:
        parents = [opened.enter_context(opened_parent(folder)) for folder in asked.parents]
        settings = [parent.config for parent in parents]
        cfg = asked.operation.result(settings)
        source = source_of(parents[0], asked.options.data)
        train = dataclasses.replace(cfg.train, init_from="")
        cfg = dataclasses.replace(cfg, data=source.data, train=train)
        carry = asked.options.moments == "carry" and all(each.has_moments for each in parents)
        yield Job(asked, parents, cfg, source, carry, asked.operation.promise(settings))


def _check_count(asked: Request) -> None:
    fewest, most = asked.operation.parents
    count = len(asked.parents)
    if count < fewest or (most is not None and count > most):
        wanted = str(fewest) if fewest == most else f"at least {fewest}"
        raise config.ConfigError(
            f"{asked.name} takes {wanted} model{'s' * (wanted != '1')}, and {count} "
            f"{'is' if count == 1 else 'are'} named; give --from once for each."
        )
