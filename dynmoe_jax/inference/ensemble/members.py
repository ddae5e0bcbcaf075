"""Members of an ensemble, as flags name them: runs that share a tokenizer, and their prior."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from dynmoe_jax.config import ConfigError
from dynmoe_jax.inference.ensemble.posterior import uniform

FLAG = "--ensemble"
UNIFORM, ESTIMATE = "uniform", "estimate"
RECORD = "ensemble.json"
"""File that an evaluation of an ensemble writes, and that a prior is read from."""


def folders_of(named: str) -> tuple[Path, ...]:
    """Folders of the members.

    Raises:
      ConfigError: there are less than two, or one comes twice.
    """
    folders = tuple(Path(part.strip()).expanduser() for part in named.split(",") if part.strip())
    if len(folders) < 2:
        raise ConfigError(f"{FLAG}={named} must name two runs or more, with commas between them.")
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"{FLAG}={named} names {folder} twice; name it once.")
    return folders


def check_one_tokenizer(folders: Sequence[Path], digests: Sequence[str]) -> None:
    """Raises ConfigError unless all members have the tokenizer of the first one.

    Args:
      folders: of the members.
      digests: fingerprints of their tokenizers.
    """
    for folder, digest in zip(folders, digests, strict=True):
        if digest != digests[0]:
            raise ConfigError(
                f"{FLAG} names {folders[0]} and {folder}, which have two tokenizers; members must "
                "share one, as runs do that begin with one model (config.train.init_from)."
            )


def check_top_k(top_k: int, members: int) -> None:
    """Raises ConfigError for a number of members that cannot keep their weight."""
    if not 0 <= top_k <= members:
        raise ConfigError(
            f"--ensemble_top_k={top_k} must be from 1 to the {members} members of the ensemble, or "
            "0 for all."
        )


def log_prior_of(named: str, members: int) -> Float[np.ndarray, "J"]:
    """Logarithm of a prior: uniform, or read from the record of an evaluation.

    Args:
      named: ``--prior``: ``uniform``, or a JSON file with ``{"prior": [0.7, 0.3]}``.
      members: J.

    Raises:
      ConfigError: the file cannot be read, or holds no prior of so many members.
    """
    if named == UNIFORM:
        return uniform(members)
    flag, path = f"--prior={named}", Path(named).expanduser()
    remedy = f"name the {RECORD} of an evaluation with --prior={ESTIMATE}, or write --prior=uniform"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["prior"]
        prior_J = np.asarray(found, np.float64)
    except OSError as error:
        raise ConfigError(f"{flag} cannot be read ({error.strerror}); {remedy}.") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        # Whole numbers beyond float64, and brackets without end, too.
        raise ConfigError(f"{flag} holds no list of numbers called 'prior'; {remedy}.") from error
    valid = prior_J.shape == (members,) and np.all(prior_J >= 0) and 0 < prior_J.sum() < np.inf
    if not valid:
        raise ConfigError(
            f"{flag} holds the prior {found}, which must be {members} numbers of at least 0, one "
            f"for each run of {FLAG}, in its order."
        )
    with np.errstate(divide="ignore"):
        return np.log(prior_J / prior_J.sum())
