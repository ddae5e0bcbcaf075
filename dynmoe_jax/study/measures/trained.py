"""A trained run of the study, opened to be measured on its held-out text.

Axis legend: N MoE layers, T held-out tokens, D documents, R bootstrap replicates.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from dynmoe_jax import config
from dynmoe_jax.data import Batch, Tokenizer, heldout_batches
from dynmoe_jax.evaluation.heldout import evaluate, make_eval_step
from dynmoe_jax.evaluation.routing.analyze import Analysis
from dynmoe_jax.evaluation.routing.gather import TokenUse
from dynmoe_jax.evaluation.routing.sums import Documents
from dynmoe_jax.model import decoder_structure, variable_shapes
from dynmoe_jax.runs.load import opened_run
from dynmoe_jax.runs.summary import HeldOut
from dynmoe_jax.runs.text import load_text
from dynmoe_jax.study.statistics import for_few


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Numbers of every held-out token, in the order in which documents are read.

    Attributes:
      token_T: ids.
      position_T: in what the model reads of the document.
      document_T: number of the document, from 0.
      bytes_T: UTF-8 bytes of the token that is predicted there.
      nll_T: loss of that token, nats.
      experts_NT: experts that the token used in each layer.
    """

    token_T: Int[np.ndarray, "T"]
    position_T: Int[np.ndarray, "T"]
    document_T: Int[np.ndarray, "T"]
    bytes_T: Int[np.ndarray, "T"]
    nll_T: Float[np.ndarray, "T"]
    experts_NT: Int[np.ndarray, "N T"]

    @property
    def mean_experts(self) -> float:
        """Experts per token, mean over layers; NaN of a dense model."""
        return float(self.experts_NT.mean()) if self.experts_NT.size else float("nan")

    @property
    def bits_per_byte(self) -> float:
        """Loss of the text."""
        return float(self.nll_T.sum() / np.log(2) / self.bytes_T.sum())

    @functools.cached_property
    def weight_DR(self) -> Float[np.ndarray, "D R"]:
        """How often each document counts in each replicate; of the same text always the same."""
        return Documents.numbered(np.array([0, self.document_T[-1]])).weight_DR.astype(np.float64)

    def of_documents(self, value_T: np.ndarray) -> Float[np.ndarray, "D"]:
        """Sums over the tokens of each document."""
        return np.bincount(self.document_T, value_T, minlength=int(self.document_T[-1]) + 1)

    def replicates(self, above_T: np.ndarray, below_T: np.ndarray) -> Float[np.ndarray, "R"]:
        """The quotient of two sums in every replicate, spread for few documents."""
        above_R, below_R = (self.of_documents(x) @ self.weight_DR for x in (above_T, below_T))
        with np.errstate(invalid="ignore", divide="ignore"):
            return for_few(above_R / below_R, self.of_documents(np.ones(len(above_T))))


class Collector:
    """Gathers :class:`Tokens` batch by batch."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._parts = tokenizer, []

    def watch(self, domain: str, batch: Batch, use: TokenUse, load_NE: np.ndarray) -> None:
        """See :data:`dynmoe_jax.evaluation.heldout.Watch`."""
        del domain, load_NE
        valid_BL = batch["segment_ids"] > 0
        names = ("tokens", "positions", "targets")
        token_T, position_T, target_T = (batch[name][valid_BL] for name in names)
        nll_T, experts_NT = use.nll_BL[valid_BL], use.experts_NBL[:, valid_BL]
        self._parts.append((token_T, position_T, target_T, nll_T, experts_NT))

    def tokens(self) -> Tokens:
        """All of them."""
        arrays = (np.concatenate(part, axis=-1) for part in zip(*self._parts, strict=True))
        token_T, position_T, target_T, nll_T, experts_NT = arrays
        # A document that goes on in the next row begins anew there, but not with BOS.
        begins_T = (position_T == 0) & (token_T == self._tokenizer.bos_id)
        document_T = np.maximum(np.cumsum(begins_T) - 1, 0)
        bytes_T = self._tokenizer.token_bytes_V[target_T]
        return Tokens(
            token_T, position_T, document_T, bytes_T, nll_T.astype(np.float64), experts_NT
        )


class TrainedRun:
    """One run with its newest checkpoint; what several measures ask for is computed once.

    Args:
      workdir: the run's folder.
      analyze: whether :attr:`routing` will be asked for.
    """

    def __init__(self, workdir: Path, analyze: bool = False):
        self.workdir, self._analyze = workdir, analyze
        with opened_run(workdir) as run:
            self.config, self.step = run.config, run.step
            self.prepared, self.tokenizer = load_text(
                run.config, workdir, run.checkpoints.position(run.step)
            )
            self.params = run.params(variable_shapes(run.config.model))
        self._steps: dict[config.Model, Callable] = {}

    @functools.cached_property
    def _measured(self) -> tuple[HeldOut, Tokens, dict | None]:
        cfg, watches = self.config, []
        collector = Collector(self.tokenizer)
        watches.append(collector.watch)
        analysis = None
        if self._analyze:
            domains, length = list(self.batches()), cfg.data.seq_len
            analysis = Analysis(cfg.model, domains, length, self.tokenizer)
            watches.append(analysis.watch)

        def watch(*arguments):
            for each in watches:
                each(*arguments)

        heldout = self._evaluate(cfg.model, self.params, watch)
        return heldout, collector.tokens(), analysis and analysis.record()

    @property
    def heldout(self) -> HeldOut:
        """Loss and experts per token of the held-out text."""
        return self._measured[0]

    @property
    def tokens(self) -> Tokens:
        """All held-out tokens."""
        return self._measured[1]

    @property
    def routing(self) -> dict | None:
        """Analysis of their routing; None where it was not asked for."""
        return self._measured[2]

    def with_router(
        self, model: config.Model, params: nnx.State, most_batches: int | None = None
    ) -> Tokens:
        """Held-out tokens of another model on the same text, such as one with another router.

        Args:
          model: its settings.
          params: its variables.
          most_batches: of each domain; None: as many as the run's own evaluation reads.
        """
        collector = Collector(self.tokenizer)
        self._evaluate(model, params, collector.watch, most_batches)
        return collector.tokens()

    def batches(self, most: int | None = None) -> dict[str, Iterator[Batch]]:
        """The held-out batches of every domain, as the run's own evaluation reads them."""
        cfg, prepared = self.config, self.prepared
        size = cfg.train.batch_size // cfg.train.microbatches
        most = most or cfg.evaluation.max_batches
        return {
            domain: heldout_batches(prepared, self.tokenizer, cfg.data, domain, size, most)
            for domain in prepared.domains
            if len(prepared.open_heldout(domain))
        }

    def _evaluate(self, model, params, watch, most_batches=None) -> HeldOut:
        if model not in self._steps:
            self._steps[model] = make_eval_step(decoder_structure(model), self.config.loss)
        bytes_V = self.tokenizer.token_bytes_V
        experts_N = [moe.num_experts for moe in model.moe_settings]
        batches = self.batches(most_batches)
        place = jax.device_put
        return evaluate(self._steps[model], params, batches, bytes_V, place, experts_N, watch)


@contextlib.contextmanager
def opened(workdir: Path, analyze: bool = False) -> Iterator[TrainedRun]:
    """A run to be measured; its programs are forgotten behind it."""
    try:
        yield TrainedRun(workdir, analyze)
    finally:
        jax.clear_caches()
