"""Held-out evaluation of a run, between its steps and at its end."""

import jax
from flax import nnx

from dynmoe_jax.console import stage
from dynmoe_jax.data import Batch, Prepared, Tokenizer, heldout_batches
from dynmoe_jax.evaluation.heldout import evaluate, make_eval_step
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
    """

    def __init__(self, run: Run, prepared: Prepared, tokenizer: Tokenizer):
        self._run, self._prepared, self._tokenizer = run, prepared, tokenizer
        step = make_eval_step(decoder_structure(run.cfg.model), run.cfg.loss)
        self._step = jax.jit(step, out_shardings=replicated(run.mesh))

    def __call__(self, params: nnx.State) -> HeldOut:
        """Evaluates; returns loss and bits per byte, of all and by domain.

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
            return evaluate(self._step, params, by_domain, token_bytes_V, self._place, experts_N)

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
