"""Weights of domains that move after the held-out evaluations of a run.

They lie with the position in the data, so that a checkpoint has them, and so has every process.
"""

from collections.abc import Mapping
from pathlib import Path

from dynmoe_jax import config
from dynmoe_jax.cluster import agreement
from dynmoe_jax.data import DataError, Prepared, TrainStream
from dynmoe_jax.data.mixture import is_proportional
from dynmoe_jax.data.reweighting import Reweighting
from dynmoe_jax.data.sources.registry import parse_weights
from dynmoe_jax.registry import chosen
from dynmoe_jax.runs.summary import HeldOut, read_summary


class DomainWeights:
    """Moves the weights of a run's domains.

    Args:
      cfg: all settings.
      stream: the training stream, at its position; its weights are moved.
      prepared: the data.

    Raises:
      ConfigError: the reference cannot be read, or lacks a domain.
      DataError: a domain whose weight moves has no held-out text.
    """

    def __init__(self, cfg: config.Config, stream: TrainStream, prepared: Prepared):
        self._stream, self._every = stream, cfg.evaluation.every_steps
        self._rule: Reweighting | None = chosen(cfg.data, "reweighting")
        self._weights: dict[str, float] = {}
        self._reference: Mapping[str, float] = {}
        if self._rule is None:
            return
        self._weights = stream.domain_weights
        _check_heldout(cfg, prepared, self._weights)
        if stream.reference is None:
            stream.reference = agreement.on_first(
                lambda: reference_losses(self._rule.reference, _setting(cfg), self._weights)
            )
        self._reference = stream.reference

    @property
    def metrics(self) -> dict[str, float]:
        """Weight of each domain in the batch that was read last, by the name of a metric."""
        return {f"domain_weight_{name}": weight for name, weight in self._weights.items()}

    def move(self, step: int, heldout: HeldOut) -> None:
        """Moves them after the evaluation of a step; not after one that is there for the end alone,
        so that a run which is made longer is the same as a long one."""
        if self._rule is None or step % self._every:
            return
        losses = {name: heldout.domains[name].loss for name in self._weights}
        self._weights = agreement.on_first(
            lambda: self._rule(self._weights, losses, self._reference)
        )
        self._stream.move_weights(self._weights)


def check_reweighting(cfg: config.Config, begun: bool) -> None:
    """Checks what can be checked before anything is written.

    Args:
      cfg: all settings.
      begun: whether the run goes on, and so knows its reference.

    Raises:
      ConfigError: weights of domains cannot move so.
    """
    rule, data = chosen(cfg.data, "reweighting"), cfg.data
    if rule is None:
        return
    if not cfg.evaluation.every_steps:
        raise config.ConfigError(
            f"config.data.reweighting={data.reweighting!r} needs held-out losses on the way; set "
            "config.evaluation.every_steps."
        )
    if is_proportional(data.domain_weights):
        raise config.ConfigError(
            f"config.data.reweighting={data.reweighting!r} moves shares of rows, and "
            f"config.data.domain_weights={data.domain_weights!r} gives none; name weights, or "
            "leave it empty."
        )
    if not begun and agreement.is_first():
        reference_losses(rule.reference, _setting(cfg), {})


def reference_losses(
    reference: str, setting: str, domains: Mapping[str, float]
) -> dict[str, float]:
    """Held-out losses by domain of ``'code=1.8,prose=2.9'``, or of the run in a folder.

    Args:
      reference: what the setting says.
      setting: its name.
      domains: that have to be there; others are left out.

    Raises:
      ConfigError: it cannot be read, or lacks a domain.
    """
    if not reference.strip():
        raise config.ConfigError(
            f"{setting}={reference!r} names no losses; give 'domain=loss' for each domain, or the "
            "folder of a finished run."
        )
    folder = Path(reference).expanduser()
    if folder.is_dir():
        summary = read_summary(folder)
        if summary is None:
            raise config.ConfigError(
                f"{setting}={reference!r} has no summary of a finished run; name another folder, "
                "or losses."
            )
        found = {name: domain.loss for name, domain in summary.heldout.domains.items()}
    else:
        try:
            found = parse_weights(reference)
        except DataError as error:
            raise config.ConfigError(
                f"{setting}={reference!r} is neither the folder of a run nor a list such as "
                "'code=1.8,prose=2.9'; correct it."
            ) from error
    if missing := sorted(set(domains) - set(found)):
        raise config.ConfigError(
            f"{setting}={reference!r} has no loss of {', '.join(missing)}; give one for each "
            "domain whose weight is above 0."
        )
    return {name: found[name] for name in domains}


def _setting(cfg: config.Config) -> str:
    return f"config.data.{cfg.data.reweighting}.reference"


def _check_heldout(cfg: config.Config, prepared: Prepared, domains: Mapping[str, float]) -> None:
    without = [name for name in domains if not len(prepared.open_heldout(name))]
    if without:
        raise DataError(
            f"config.data.reweighting={cfg.data.reweighting!r} needs held-out text of each domain, "
            f"and {', '.join(without)} has none; raise config.data.heldout_fraction, or give it a "
            "weight of 0 in config.data.domain_weights."
        )
