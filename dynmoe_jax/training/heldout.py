"""Held-out evaluation of a run, between its steps and at its end."""

from typing import Any

import jax
from flax import nnx

from dynmoe_jax.cluster.agreement import is_first
from dynmoe_jax.console import stage
from dynmoe_jax.data import Batch, Prepared, Tokenizer, heldout_batches
from dynmoe_jax.evaluation.heldout import evaluate, make_eval_step
from dynmoe_jax.evaluation.routing.analyze import Analysis
from dynmoe_jax.mesh.make_mesh import batch_sharding, replicated
from dynmoe_jax.model import decoder_structure
from dynmoe_jax.runs.summary import HeldOut
from dynmoe_jax.training.feed import place_whole
from dynmoe_jax.training.run import Run


class HeldOutEvaluation:
    """Evaluates parameters on at most ``evaluation.max_batches`` batches of every domain.

    Args:
      run: the run; calls are within its mesh.
      prepared: its data.
      tokenizer: its tokenizer.

    Attributes:
      routing: analysis of the last pass, see :mod:`dynmoe_jax.evaluation.routing.record`; None if
        nobody asked for it, the model is dense, or this is not process 0.
    """

    routing: dict[str, Any] | None = None

    def __init__(self, run: Run, prepared: Prepared, tokenizer: Tokenizer):
        self._run, self._prepared, self._tokenizer = run, prepared, tokenizer
        step = make_eval_step(decoder_structure(run.cfg.model), run.cfg.loss)
        self._step = jax.jit(step, out_shardings=replicated(run.mesh))

    def __call__(self, params: nnx.State, analyze: bool = False) -> HeldOut:
        """Evaluates; returns loss and bits per byte, of all and by domain.

        Args:
          params: of the model.
          analyze: add up on the way what :attr:`routing` says.

        Raises:
          Stopped: the run was asked to stop.
        """
        prepared = self._prepared
        with (
            self._run.seconds.of("evaluation"),
            stage("Evaluating on held-out text", unit="batches") as shown,
        ):
            domains = [name for name in prepared.domains if len(prepared.open_heldout(name))]
            by_domain = {domain: self._batches(domain, shown) for domain in domains}
            token_bytes_V = self._tokenizer.token_bytes_V
            experts_N = [moe.num_experts for moe in self._run.cfg.model.moe_settings]
            watch = None
            analyze = analyze and self._run.cfg.evaluation.report
            if analyze and experts_N and is_first():
                model, length = self._run.cfg.model, self._run.cfg.data.seq_len
                analysis = Analysis(model, domains, length, self._tokenizer)
                watch = analysis.watch
            placed = self._step, params, by_domain, token_bytes_V, self._place
            found = evaluate(*placed, experts_N, watch)
            self.routing = analysis.record() if watch else None
            return found

    def _batches(self, domain: str, shown):
        cfg = self._run.cfg
        size = cfg.train.batch_size // cfg.train.microbatches
        for batch in heldout_batches(
            self._prepared, self._tokenizer, cfg.data, domain, size, cfg.evaluation.max_batches
        ):
            yield batch
            shown.advance()

    def _place(self, batch: Batch) -> Batch:
        self._run.stop.check()
        return place_whole(batch, batch_sharding(self._run.mesh))
