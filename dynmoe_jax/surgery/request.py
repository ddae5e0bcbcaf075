"""Request of surgery, and everything that can be known before an array is read."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.calibration import Price, price
from dynmoe_jax.calibration.pricing import check_price
from dynmoe_jax.data import Tokenizer
from dynmoe_jax.fields import free_setting
from dynmoe_jax.surgery.measuring.text import Source, source_of
from dynmoe_jax.surgery.operation import OPERATIONS, Operation, Wanted
from dynmoe_jax.surgery.storage.parent import Parent, opened_parent
from dynmoe_jax.surgery.storage.target import free_place

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
    calibration_tokens: int = free_setting(
        16384,
        "training tokens that statistics are gathered of, where an operation needs any",
        unit="tokens",
        low=1,
    )
    calibration_memory: float = free_setting(
        8.0, "most memory that gathering them may take", unit="GB", above=0.0
    )
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
        f"{DEFAULT} where neither has more than {MOST_PARAMETERS / 1e6:.0f}M parameters and the "
        "run of the first wrote one itself (config.evaluation.sample_tokens)",
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
        return next(name for name, kind in OPERATIONS.items() if type(self.operation) is kind)


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that nothing speaks against.

    Attributes:
      asked: the request.
      to: folder of the result, links followed.
      parents: the models, opened.
      cfg: settings of the result.
      source: of the text that both are measured on.
      tokenizer: which all models share.
      history: of the first model, see :attr:`.storage.parent.Parent.history`.
      moments: whether moments are carried over.
      promise: see :meth:`.operation.Operation.promise`; None where parameters are rounded.
      wanted: statistics of the first parent.
      price: of gathering them; None where there are none.
    """

    asked: Request
    to: Path
    parents: list[Parent]
    cfg: config.Config
    source: Source
    tokenizer: Tokenizer
    history: list[dict[str, Any]]
    moments: bool
    promise: float | None
    wanted: Wanted
    price: Price | None

    @property
    def remarks(self) -> list[str]:
        """Sentences that a user should read about the result."""
        settings = [parent.config for parent in self.parents]
        found = self.asked.operation.remarks(settings)
        if self.promise is None and self.asked.operation.promise(settings) is not None:
            found.append(
                f"Parameters are rounded to {self.asked.options.dtype}: the function is kept no "
                "better than that allows."
            )
        return found


@contextlib.contextmanager
def checked(asked: Request) -> Iterator[Job]:
    """Opens the models, and finds out what the result will be.

    Raises:
      ConfigError: something speaks against it.
      CheckpointError: a model cannot be read.
      DataError: a tokenizer or a source of text cannot be.
    """
    check_count(asked)
    to = free_place(asked.to)
    with contextlib.ExitStack() as opened:
        parents = [opened.enter_context(opened_parent(folder)) for folder in asked.parents]
        _check_masks(asked, parents)
        settings = [parent.config for parent in parents]
        cfg = asked.operation.result(settings)
        source = source_of(parents[0], asked.options.data)
        train = dataclasses.replace(cfg.train, init_from="")
        cfg = dataclasses.replace(cfg, data=source.data, train=train)
        carry = asked.options.moments == "carry" and all(each.has_moments for each in parents)
        promise = asked.operation.promise(settings) if asked.options.dtype == "float32" else None
        wanted = asked.operation.wanted(settings)
        cost = price_of(wanted, settings[0], asked.options)
        tokenizer, history = _shared_tokenizer(parents), parents[0].history
        of_result = to, parents, cfg, source, tokenizer, history, carry, promise
        yield Job(asked, *of_result, wanted, cost)


def _check_masks(asked: Request, parents: Sequence[Parent]) -> None:
    """Raises ConfigError for a model that has grown and is not whole yet."""
    for parent in () if asked.operation.takes_masks else parents:
        if parent.config.model.mask_steps:
            raise config.ConfigError(
                f"--from={parent.folder} has grown, and its masks are below 1, which {asked.name} "
                "would lose; train it on until they are 1."
            )


def _shared_tokenizer(parents: Sequence[Parent]) -> Tokenizer:
    """The tokenizer that all parents share."""
    found = [parent.tokenizer() for parent in parents]
    for parent, tokenizer in zip(parents, found, strict=True):
        if tokenizer is None:
            raise config.ConfigError(
                f"--from={parent.folder} holds no tokenizer; put the model's own one there."
            )
        if tokenizer.fingerprint != found[0].fingerprint:
            raise config.ConfigError(
                f"--from={parent.folder} has another tokenizer than --from={parents[0].folder}; "
                "give models that share one."
            )
    return found[0]


def price_of(wanted: Wanted, parent: config.Config, options: Options) -> Price | None:
    """The price of statistics; None where none are wanted.

    Raises:
      ConfigError: they need more memory than they may have.
    """
    if not wanted.names:
        return None
    tokens, own = options.calibration_tokens, wanted.model or parent.model
    lengths = {"length": parent.data.seq_len, "samples": wanted.samples, "layers": wanted.layers}
    found = price(own, wanted.names, tokens, **lengths)
    # Clusters of text are gathered one after another, and what was found is kept.
    kept = sum(found.statistic_bytes.values()) * (wanted.clusters - 1)
    check_price(found, int(options.calibration_memory * 1e9) - kept, tokens)
    return found


def check_count(asked: Request) -> None:
    """Raises ConfigError for more or fewer models than the operation takes."""
    fewest, most = asked.operation.parents
    count = len(asked.parents)
    if count < fewest or (most is not None and count > most):
        wanted = str(fewest) if fewest == most else f"at least {fewest}"
        raise config.ConfigError(
            f"{asked.name} takes {wanted} model{'s' * (wanted != '1')}, and {count} "
            f"{'is' if count == 1 else 'are'} named; give --from once for each."
        )
