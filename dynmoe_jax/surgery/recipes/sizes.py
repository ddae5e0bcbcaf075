"""Sizes of recipes: settings of the dense model that they begin with."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.data.sources.document import Document
from dynmoe_jax.data.sources.registry import read_documents


def tiny() -> config.Config:
    """Two narrow layers and a few steps: for tests."""
    return config.Config(
        model=config.Model(
            num_layers=2,
            width=32,
            num_heads=2,
            num_kv_heads=2,
            head_width=16,
            hidden_width=64,
            vocab_size=512,
            max_seq_len=64,
            init_std=0.1,
            moe=config.MoE(every_n_layers=0),
        ),
        loss=config.Loss(chunk_tokens=512),
        data=config.Data(sources="python", seq_len=64, max_megabytes=0.3),
        train=config.Train(steps=20, batch_size=8, log_every_steps=1),
        optimizer=config.Optimizer(learning_rate=5e-3, warmup_steps=5),
        checkpoint=config.Checkpoint(every_steps=10, keep=1),
        evaluation=config.Evaluation(max_batches=4, sample_tokens=0, report=False),
        logging=config.Logging(tensorboard=False),
    )


def laptop() -> config.Config:
    """Four layers of width 192, half a million tokens: minutes on two cores."""
    return config.Config(
        model=config.Model(
            num_layers=4,
            width=192,
            num_heads=3,
            num_kv_heads=3,
            head_width=64,
            hidden_width=512,
            vocab_size=4096,
            max_seq_len=256,
            # Narrower than the paper's model by five, so wider draws.
            init_std=0.05,
            moe=config.MoE(every_n_layers=0),
        ),
        loss=config.Loss(chunk_tokens=512),
        data=config.Data(sources="python", seq_len=128, max_megabytes=8.0),
        train=config.Train(steps=500, batch_size=8, log_every_steps=10),
        optimizer=config.Optimizer(learning_rate=2e-3, warmup_steps=40),
        checkpoint=config.Checkpoint(every_steps=125, keep=1),
        evaluation=config.Evaluation(max_batches=40, every_steps=100),
        logging=config.Logging(tensorboard=False),
    )


SIZES: dict[str, Callable[[], config.Config]] = {"laptop": laptop, "tiny": tiny}


def dense(size: str, seed: int, data: str = "", **changes: Any) -> config.Config:
    """Settings of a dense model of a size.

    Args:
      size: a name of :data:`SIZES`.
      seed: of parameters and of the order of the data.
      data: sources of text; empty: the size's own.
      changes: settings of ``config.train``, such as ``steps``.
    """
    cfg = SIZES[size]()
    text = dataclasses.replace(cfg.data, sources=data or cfg.data.sources)
    train = dataclasses.replace(cfg.train, **changes)
    return dataclasses.replace(cfg, seed=seed, data=text, train=train)


def share_of_steps(size: str, share: float) -> int:
    """A part of a size's steps of training, at least two."""
    return max(2, round(share * SIZES[size]().train.steps))


PYTHON_DOMAINS = ("code", "docs", "prose")
"""Domains of the text that a Python installation carries, which need not be read to know them."""

_MOST_READ = 20_000
"""Documents that are read to find the domains of other text."""


def domains_of(data: str) -> tuple[str, ...]:
    """Domains of the text of a recipe, sorted; of other text than Python's it is read for them.

    Args:
      data: sources of text; empty: the sizes' own.

    Raises:
      ConfigError: there are less than two.
    """
    if data in ("", "python"):
        return PYTHON_DOMAINS
    documents = itertools.islice(read_documents(config.Data(sources=data)), _MOST_READ)
    found = sorted({document.domain for document in documents if isinstance(document, Document)})
    if len(found) < 2:
        raise config.ConfigError(
            f"--data={data} has {len(found)} domains, and branches need two or more; name text in "
            "several files, or with a field 'domain'."
        )
    return tuple(found)


def heldout_tokens(size: str, domains: Sequence[str]) -> int:
    """Held-out tokens that a training of a size evaluates, at most.

    For operations whose parents differ by domain: on less text, where domains have other shares,
    what they add to the first parent says little about all of it.
    """
    cfg = SIZES[size]()
    rows = cfg.evaluation.max_batches * cfg.train.batch_size
    return rows * cfg.data.seq_len * len(domains)


def one_of(domains: Sequence[str], domain: str) -> str:
    """Settings of ``config.data.domain_weights`` that read one domain alone."""
    return ",".join(f"{name}={int(name == domain)}" for name in domains)
