"""Loss, bits per byte and experts per token on held-out text, by domain.

Axis legend: B batch, L positions, V vocabulary, N MoE layers, E experts, K slots per token.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dynmoe_jax import config
from dynmoe_jax.model.kernels.cross_entropy.chunked import cross_entropy_sums
from dynmoe_jax.model.layer import LayerOutput
from dynmoe_jax.model.output import in_layer_order, padded
from dynmoe_jax.routing import statistics
from dynmoe_jax.runs.summary import DomainResult, HeldOut


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums that add up over batches.

    Attributes:
      nll: negative log-likelihood of the targets, nats.
      tokens: targets.
      load_NE: tokens that chose each expert.
      histogram_NK: tokens by number of experts, 0 to K.
    """

    nll: Float[Array, ""]
    tokens: Int[Array, ""]
    load_NE: Int[Array, "N E"]
    histogram_NK: Int[Array, "N K+1"]


def _counts(valid_BL, output: LayerOutput) -> tuple[Int[Array, "E"], Int[Array, "K+1"]]:
    """(load of each expert, tokens by number of experts) of one layer."""
    routing = output.moe.routing
    return routing.load_E, statistics.count_histogram(routing, valid_BL.reshape(-1))


def make_eval_step(structure: nnx.GraphDef, loss: config.Loss) -> Callable[..., Sums]:
    """Builds the jitted (params, batch) -> Sums."""

    @jax.jit
    def eval_step(params, batch):
        decoder = nnx.merge(structure, params)
        valid_BL = batch["segment_ids"] > 0
        x_BLD, counts = decoder.tapped(
            batch["tokens"], batch["segment_ids"], batch["positions"], partial(_counts, valid_BL)
        )
        _, nll_BL = cross_entropy_sums(
            x_BLD,
            decoder.output_DV,
            batch["targets"],
            valid_BL,
            chunk_tokens=loss.chunk_tokens,
            plain=decoder.config.plain,
        )
        if counts:
            loads, histograms = zip(*counts, strict=True)
            load_NE = in_layer_order(padded(loads), decoder.moe_layers)
            histogram_NK = in_layer_order(padded(histograms), decoder.moe_layers)
        else:
            load_NE = histogram_NK = jnp.zeros((0, 1), jnp.int32)
        return Sums(jnp.sum(nll_BL), jnp.sum(valid_BL), load_NE, histogram_NK)

    return eval_step


@dataclasses.dataclass
class _Domain:
    """Host-side totals of one domain, in float64 and int64."""

    sums: Sums
    bytes: int
    counts_V: np.ndarray


def evaluate(
    eval_step: Callable[..., Sums],
    params: nnx.State,
    batches_by_domain: dict[str, Iterable[dict[str, np.ndarray]]],
    token_bytes_V: np.ndarray,
    place: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]] = jax.device_put,
    experts_N: Sequence[int] = (),
) -> HeldOut:
    """Evaluates a model on every domain's held-out batches.

    Bits per byte divide by the UTF-8 bytes that the target tokens stand for, so that models with
    different tokenizers compare.

    Args:
      eval_step: from :func:`make_eval_step`.
      params: the model's parameters.
      batches_by_domain: packed batches by the domain's name.
      token_bytes_V: bytes that each token stands for.
      place: puts a host batch on the devices.
      experts_N: experts of each MoE layer, where layers differ.
    """
    domains = {
        name: _sum_domain(partial(eval_step, params), batches, token_bytes_V, place)
        for name, batches in batches_by_domain.items()
    }
    total = _Domain(
        jax.tree.map(lambda *x: sum(x), *(d.sums for d in domains.values())),
        sum(d.bytes for d in domains.values()),
        sum(d.counts_V for d in domains.values()),
    )
    tokens = max(1, int(total.sums.tokens))
    loads = (total.sums.load_NE / tokens).tolist()
    return HeldOut(
        loss=float(total.sums.nll) / tokens,
        bits_per_byte=_bits_per_byte(total),
        unigram_entropy=_entropy(total.counts_V),
        domains={name: _domain_result(domain) for name, domain in domains.items()},
        experts_per_token_by_layer=(total.sums.load_NE.sum(axis=-1) / tokens).tolist(),
        load_by_layer=[load[:own] for load, own in itertools.zip_longest(loads, experts_N)],
        histogram_by_layer=total.sums.histogram_NK.tolist(),
    )


def _sum_domain(run, batches, token_bytes_V, place) -> _Domain:
    total = None
    for batch in batches:
        sums = jax.tree.map(np.float64, jax.device_get(run(place(batch))))
        targets = batch["targets"][batch["segment_ids"] > 0]
        counts_V = np.bincount(targets, minlength=len(token_bytes_V))
        part = _Domain(sums, int(token_bytes_V[targets].sum()), counts_V)
        if total is None:
            total = part
        else:
            total.sums = jax.tree.map(np.add, total.sums, part.sums)
            total.bytes += part.bytes
            total.counts_V = total.counts_V + part.counts_V
    return total


def _domain_result(domain: _Domain) -> DomainResult:
    tokens = max(1, int(domain.sums.tokens))
    by_layer = (domain.sums.load_NE.sum(axis=-1) / tokens).tolist()
    return DomainResult(
        loss=float(domain.sums.nll) / tokens,
        bits_per_byte=_bits_per_byte(domain),
        tokens=tokens,
        experts_per_token=float(np.mean(by_layer)) if by_layer else float("nan"),
        experts_per_token_by_layer=by_layer,
    )


def _bits_per_byte(domain: _Domain) -> float:
    return float(domain.sums.nll) / np.log(2) / max(1, domain.bytes)


def _entropy(counts_V: np.ndarray) -> float:
    """Entropy in nats of the distribution that the counts describe."""
    share = counts_V[counts_V > 0] / counts_V.sum()
    return float(-(share * np.log(share)).sum())
