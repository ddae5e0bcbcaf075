"""Summary of a finished run: ``summary.json``.

The closing table (:mod:`dynmoe_jax.training.log.summary_tables`) and the report
(:mod:`dynmoe_jax.evaluation.report.page`) are both drawn from this one record, and a command that
is run again on a complete run reads it back instead of training.

Axis letters: N MoE layers, E experts, K the bound on experts per token.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from dynmoe_jax.console import warn
from dynmoe_jax.runs.records import from_json, to_json, write_atomically

FILE_NAME = "summary.json"


@dataclasses.dataclass(frozen=True)
class DomainResult:
    """Result on one held-out domain: how well it is predicted, and with how many experts."""

    loss: float  # nats per token
    bits_per_byte: float
    tokens: int
    experts_per_token: float = math.nan  # mean over tokens and layers; NaN in a dense model
    experts_per_token_by_layer: list[float] = dataclasses.field(default_factory=list)  # [N]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Evaluation on the held-out split.  Lists are empty in a dense model."""

    loss: float  # nats per token, over all domains
    bits_per_byte: float
    unigram_entropy: float  # nats per token of these tokens under their own unigram distribution
    domains: dict[str, DomainResult]
    experts_per_token_by_layer: list[float] = dataclasses.field(default_factory=list)  # [N]
    # Share of the tokens that chose each expert: a row sums to the layer's experts per token.
    load_by_layer: list[list[float]] = dataclasses.field(default_factory=list)  # [N][E]
    # How many tokens used 0, 1, … K experts.
    histogram_by_layer: list[list[int]] = dataclasses.field(default_factory=list)  # [N][K + 1]

    @property
    def experts_per_token(self) -> float:
        """Mean over tokens and MoE layers; NaN in a dense model."""
        layers = self.experts_per_token_by_layer
        return sum(layers) / len(layers) if layers else math.nan

    @property
    def experts(self) -> str:
        """Experts of a layer in words: ``16``, or ``4 to 12`` where layers differ."""
        counts = {len(load) for load in self.load_by_layer}
        return " to ".join(str(count) for count in sorted({min(counts), max(counts)}))


@dataclasses.dataclass(frozen=True)
class Sample:
    """Sample of what the model writes."""

    prompt: str
    text: str  # the continuation, without the prompt
    # (text of a token, its mean experts over the layers); joined, they are ``text``.
    pieces: list[tuple[str, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Summary:
    """The results of a run."""

    complete: bool
    step: int  # steps done
    steps: int  # steps asked for
    parameters: int
    active_parameters: float  # mean per token
    heldout: HeldOut
    tokens_per_second: float  # median over the logged steps
    mfu: float  # share of the hardware's peak; NaN where the peak is unknown
    # By activity: "data preparation", "compile", "data waiting", "step", "evaluation"; and "total".
    seconds: dict[str, float]
    sample: Sample | None  # None where it was left out
    paths: dict[str, str]  # what is there -> path relative to the run's folder
    # What the run does without (sample, generation, evaluation) -> why.
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def reasons(self) -> list[str]:
        """Parts that were left out and why, a sentence for each reason."""
        names_by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            names_by_reason.setdefault(reason, []).append(name)
        return [f"No {', '.join(names)}: {why}" for why, names in names_by_reason.items()]

    @property
    def total_seconds(self) -> float:
        """The whole command; NaN if it was not measured."""
        return self.seconds.get("total", math.nan)

    def activities(self) -> dict[str, float]:
        """Seconds by activity, which add up to the total."""
        parts = {name: seconds for name, seconds in self.seconds.items() if name != "total"}
        rest = self.total_seconds - sum(parts.values())
        return parts | ({"everything else": rest} if rest > 0.05 else {})

    def share(self, seconds: float) -> float:
        """``seconds`` as a part of the total."""
        return seconds / self.total_seconds if self.total_seconds > 0 else math.nan


def write_summary(workdir: Path, summary: Summary) -> Path:
    """Writes ``summary.json`` atomically and returns its path."""
    path = workdir / FILE_NAME
    write_atomically(path, to_json(dataclasses.asdict(summary), indent=2) + "\n")
    return path


def read_summary(workdir: Path) -> Summary | None:
    """The run's summary, or None where no run has written one, or it has been damaged."""
    path = workdir / FILE_NAME
    if not path.exists():
        return None
    try:
        return _build(from_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        warn(f"{path} cannot be read, and is written anew when the run is complete.")
        return None


def _build(record: dict[str, Any]) -> Summary:
    heldout, sample = record.pop("heldout"), record.pop("sample")
    domains = {name: DomainResult(**domain) for name, domain in heldout.pop("domains").items()}
    if isinstance(sample, dict):
        pieces = [(text, experts) for text, experts in sample.pop("pieces")]
        sample = Sample(**sample, pieces=pieces)
    else:  # null is read as NaN
        sample = None
    return Summary(
        **record,
        heldout=HeldOut(**heldout, domains=domains),
        sample=sample,
    )
