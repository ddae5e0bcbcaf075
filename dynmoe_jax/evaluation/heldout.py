"""Loss, bits per byte and experts per token on held-out text, by domain.

Axis legend: B batch, L positions, V vocabulary, N MoE layers, E experts, K slots per token.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dynmoe_jax import config
from dynmoe_jax.evaluation.routing.gather import TokenUse
from dynmoe_jax.model.kernels.cross_entropy.chunked import cross_entropy_sums
from dynmoe_jax.model.layer import LayerOutput
from dynmoe_jax.model.output import in_layer_order, padded
from dynmoe_jax.routing import Routing, statistics
from dynmoe_jax.runs.summary import DomainResult, HeldOut

Watch = Callable[[str, dict[str, np.ndarray], TokenUse, np.ndarray], None]
"""``(domain, batch, use of experts by its tokens, load_NE)``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums that add up over batches.

    Attributes:
      nll: negative log-likelihood of the targets, nats.
      tokens: targets.
      load_NE: tokens that chose each expert.
      histogram_NK: tokens by number of experts, 0 to K.
      by_token: of each token of the batch, which does not add up; taken away where sums are added.
    """

    nll: Float[Array, ""]
    tokens: Int[Array, ""]
    load_NE: Int[Array, "N E"]
    histogram_NK: Int[Array, "N K+1"]
    by_token: TokenUse | None = None


def _counts(valid_BL, output: LayerOutput) -> tuple[Array, ...] | None:
    """Counts of one MoE layer: load of each expert, tokens by number of experts; and of each token
    the experts chosen, the first choice, the experts left behind the transforms."""
    if output.moe is None:
        return None
    routing = output.moe.routing
    histogram_K = statistics.count_histogram(routing, valid_BL.reshape(-1))
    of_token = (routing.experts_per_token_T, _first_choice(routing), output.moe.kept_T)
    return routing.load_E, histogram_K, *(x_T.astype(jnp.int16) for x_T in of_token)


def _first_choice(routing: Any) -> Int[Array, "T"]:
    """The expert of the largest weight, of equal ones the one chosen first; -1: none."""
    if not isinstance(routing, Routing):  # tokens of soft slots choose nobody
        return jnp.full_like(routing.experts_per_token_T, -1)
    weight_TK = jnp.where(routing.used_TK, routing.weight_TK, -jnp.inf)
    slot_T1 = jnp.argmax(weight_TK, axis=-1, keepdims=True)
    expert_T = jnp.take_along_axis(routing.expert_TK, slot_T1, axis=-1)[..., 0]
    return jnp.where(routing.experts_per_token_T > 0, expert_T, -1)


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
            load_NE, histogram_NK, *uses = (
                in_layer_order(padded(parts), decoder.moe_layers)
                for parts in zip(*counts, strict=True)
            )
        else:
            load_NE = histogram_NK = jnp.zeros((0, 1), jnp.int32)
            by_layer = len(dataclasses.fields(TokenUse)) - 1
            uses = [jnp.zeros((0, *nll_BL.shape), jnp.int16)] * by_layer
        by_token = TokenUse(nll_BL, *(use.reshape(-1, *nll_BL.shape) for use in uses))
        return Sums(jnp.sum(nll_BL), jnp.sum(valid_BL), load_NE, histogram_NK, by_token)

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
    watch: Watch | None = None,
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
      watch: is shown the tokens of every batch, domain after domain.
    """
    domains = {
        name: _sum_domain(
            partial(eval_step, params),
            batches,
            token_bytes_V,
            place,
            watch and partial(watch, name),
        )
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


def _sum_domain(run, batches, token_bytes_V, place, watch=None) -> _Domain:
    total = None
    for batch in batches:
        found = run(place(batch))
        by_token, found = found.by_token, dataclasses.replace(found, by_token=None)
        sums = jax.tree.map(np.float64, jax.device_get(found))
        if watch:
            watch(batch, jax.device_get(by_token), sums.load_NE)
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
