"""Losses and choices of every token, and how far two models are apart, without holding logits.

The output projection is gone through in chunks of the vocabulary, tokens in chunks within each.

Axis legend: B batch, L positions, T valid tokens of all batches, C tokens of one chunk, D model
width, V vocabulary, v part of the vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from dynmoe_jax import config
from dynmoe_jax.calibration.stream import Batch
from dynmoe_jax.console import stage
from dynmoe_jax.model.components import compute_dtype
from dynmoe_jax.runs.load import OpenedRun

Hidden = Sequence[Float[np.ndarray, "B L D"]]
"""The normed residual stream of each batch."""

TOKENS_AT_ONCE = 512
COLUMNS_AT_ONCE = 8192
"""Logits that exist at one time: 16 MiB of each model in float32, and some times as much of what is
computed of them."""


@dataclasses.dataclass(frozen=True)
class LogitStatistics:
    """Numbers of every valid token, in the order of the batches.

    Attributes:
      nll_T: negative log-likelihood of the target, nats.
      argmax_T: the most probable token.
      largest_T: the largest logit by absolute value.
      other_nll_T: the same of a second model; None without one, like all that follow.
      other_argmax_T: likewise.
      difference_T: the largest absolute difference of two logits.
      kl_T: KL(first || second), nats.
    """

    nll_T: Float[np.ndarray, "T"]
    argmax_T: Int[np.ndarray, "T"]
    largest_T: Float[np.ndarray, "T"]
    other_nll_T: Float[np.ndarray, "T"] | None = None
    other_argmax_T: Int[np.ndarray, "T"] | None = None
    difference_T: Float[np.ndarray, "T"] | None = None
    kl_T: Float[np.ndarray, "T"] | None = None

    @property
    def largest(self) -> float:
        """The largest logit of the first model, by absolute value."""
        return float(self.largest_T.max(initial=0.0))

    @property
    def agrees_T(self) -> Bool[np.ndarray, "T"]:
        """Whether both models find the same token most probable."""
        return self.argmax_T == self.other_argmax_T


def logit_statistics(
    run: OpenedRun,
    hidden: Hidden,
    batches: Sequence[Batch],
    other: tuple[OpenedRun, Hidden] | None = None,
) -> LogitStatistics:
    """Statistics of the logits of one model, or of two on the same batches.

    Args:
      run: the model, of which the output projection is read.
      hidden: what :func:`~dynmoe_jax.calibration.stream.forward` returned for it.
      batches: with ``targets``.
      other: the same of a second model.

    Raises:
      ConfigError: their vocabularies differ.
    """
    models = [(run, hidden)] + ([other] if other else [])
    _check_vocabularies([each.config.model for each, _ in models])
    flat, targets, _ = zip(*(_flat(each, batches) for _, each in models), strict=True)
    sums = _all_sums([each for each, _ in models], flat, targets[0])
    first = *_found(sums, 0), sums["largest"]
    if not other:
        return LogitStatistics(*first)
    log_z_T, other_log_z_T = (np.log(sums[f"mass_{i}"]) + sums[f"most_{i}"] for i in (0, 1))
    kl_T = sums["apart"] / sums["mass_0"] - (log_z_T - other_log_z_T)
    # Rounding can leave a little less than nothing.
    kl_T = np.maximum(kl_T, 0.0)
    return LogitStatistics(*first, *_found(sums, 1), sums["difference"], kl_T)


def _found(sums: dict[str, np.ndarray], i: int) -> tuple[np.ndarray, np.ndarray]:
    """(nll_T, argmax_T) of a model."""
    log_z_T = np.log(sums[f"mass_{i}"]) + sums[f"most_{i}"]
    return log_z_T - sums[f"target_{i}"], sums[f"argmax_{i}"]


def _check_vocabularies(models: Sequence[config.Model]) -> None:
    sizes = [model.vocab_size for model in models]
    if len(set(sizes)) > 1:
        raise config.ConfigError(
            f"config.model.vocab_size is {sizes[0]} in one model and {sizes[1]} in the other; only "
            "logits over the same vocabulary can be compared."
        )


def _all_sums(runs, flat, targets_T) -> dict[str, np.ndarray]:
    """Sums over the whole vocabulary of every token, by name."""
    heads = [_head_VD(run) for run in runs]
    dtypes = tuple(compute_dtype(run.config.model) for run in runs)
    chunks = _chunks(len(targets_T), TOKENS_AT_ONCE)
    parts = _chunks(len(heads[0]), COLUMNS_AT_ONCE)
    carried = [_nothing(len(targets_T[chunk]), len(runs)) for chunk in chunks]
    title = "Comparing logits" if len(runs) > 1 else "Computing losses"
    with stage(title, len(parts) * len(chunks)) as shown:
        for part in parts:
            of_part = [jnp.asarray(head[part]) for head in heads]
            for i, chunk in enumerate(chunks):
                x_CDs, at = [x_TD[chunk] for x_TD in flat], targets_T[chunk] - part.start
                carried[i] = _add(dtypes, carried[i], x_CDs, of_part, at, part.start)
                shown.advance()
            jax.block_until_ready(carried)  # or parts of the projection would pile up
    carried = jax.device_get(carried)
    names = carried[0] if carried else _nothing(0, len(runs))
    return {name: np.concatenate([part[name] for part in carried]) for name in names}


def _head_VD(run: OpenedRun) -> Float[np.ndarray, "V D"]:
    """The output projection, by rows of tokens."""
    if run.config.model.tie_embeddings:
        return run.read(("embedding_VD",))
    return run.read(("head_DV",)).T


def _nothing(tokens: int, models: int) -> dict[str, np.ndarray]:
    """Sums over no part of the vocabulary yet."""
    zeros_C, low_C = np.zeros(tokens, np.float32), np.full(tokens, -np.inf, np.float32)
    sums = {"largest": zeros_C}
    for i in range(models):
        sums |= {f"most_{i}": low_C, f"mass_{i}": zeros_C, f"target_{i}": zeros_C}
        sums[f"argmax_{i}"] = np.zeros(tokens, np.int32)
    if models > 1:
        sums |= {"difference": zeros_C, "apart": zeros_C}
    return sums


@partial(jax.jit, static_argnums=0)
def _add(dtypes, sums, x_CDs, head_vDs, targets_C, first):
    """The sums with one more part of the vocabulary.

    Args:
      dtypes: compute types of the models.
      sums: most_C the largest logit; mass_C the sum of exp(logit - most); apart_C that of
        exp(first's logit - most) times the difference of the two logits.
      x_CDs: hidden states of each model.
      head_vDs: part of the output projection of each.
      targets_C: places of the targets, from the first of this part on.
      first: token id with which this part begins.
    """
    sums = dict(sums)
    logits = [
        jnp.einsum("cd,vd->cv", x.astype(t), w.astype(t), preferred_element_type=jnp.float32)
        for x, w, t in zip(x_CDs, head_vDs, dtypes, strict=True)
    ]
    sums["largest"] = jnp.maximum(sums["largest"], jnp.max(jnp.abs(logits[0]), axis=-1))
    if len(logits) > 1:
        apart_Cv = logits[0] - logits[1]
        largest_C = jnp.max(jnp.abs(apart_Cv), axis=-1)
        sums["difference"] = jnp.maximum(sums["difference"], largest_C)
    for i, logits_Cv in enumerate(logits):
        before_C, here_C = sums[f"most_{i}"], jnp.max(logits_Cv, axis=-1)
        best_C = jnp.argmax(logits_Cv, axis=-1) + first
        sums[f"argmax_{i}"] = jnp.where(here_C > before_C, best_C, sums[f"argmax_{i}"])
        most_C = jnp.maximum(before_C, here_C)
        scale_C, exp_Cv = jnp.exp(before_C - most_C), jnp.exp(logits_Cv - most_C[:, None])
        sums[f"mass_{i}"] = scale_C * sums[f"mass_{i}"] + jnp.sum(exp_Cv, axis=-1)
        if i == 0 and len(logits) > 1:
            sums["apart"] = scale_C * sums["apart"] + jnp.sum(exp_Cv * apart_Cv, axis=-1)
        sums[f"most_{i}"] = most_C
        hit_Cv = targets_C[:, None] == jnp.arange(logits_Cv.shape[-1])
        sums[f"target_{i}"] += jnp.sum(jnp.where(hit_Cv, logits_Cv, 0), axis=-1)
    return sums


def loss_gradients(
    run: OpenedRun, hidden: Hidden, batches: Sequence[Batch]
) -> list[Float[np.ndarray, "B L D"]]:
    """The gradient of the sum of all losses by the normed stream of each batch, float32.

    Args:
      run: the model, of which the output projection is read.
      hidden: what :func:`~dynmoe_jax.calibration.stream.forward` returned for it.
      batches: with ``targets``.
    """
    x_TD, targets_T, valid = _flat(hidden, batches)
    sums = _all_sums([run], [x_TD], targets_T)
    log_z_T = np.log(sums["mass_0"]) + sums["most_0"]
    dx_TD = np.zeros(x_TD.shape, np.float32)
    dtype = compute_dtype(run.config.model)
    head_VD, chunks = _head_VD(run), _chunks(len(targets_T), TOKENS_AT_ONCE)
    parts = _chunks(len(head_VD), COLUMNS_AT_ONCE)
    with stage("Computing gradients of losses", len(parts) * len(chunks)) as shown:
        for part in parts:
            head_vD = jnp.asarray(head_VD[part])
            for chunk in chunks:
                at = targets_T[chunk] - part.start
                dx_TD[chunk] += _gradient(dtype, x_TD[chunk], head_vD, at, log_z_T[chunk])
                shown.advance()
    found, done = [], 0
    for valid_BL in valid:
        dx_BLD = np.zeros((*valid_BL.shape, dx_TD.shape[-1]), np.float32)
        tokens = int(valid_BL.sum())
        dx_BLD[valid_BL] = dx_TD[done : done + tokens]
        found.append(dx_BLD)
        done += tokens
    return found


@partial(jax.jit, static_argnums=0)
def _gradient(dtype, x_CD, head_vD, targets_C, log_z_C):
    """The part of the gradient of losses by x_CD that some columns of the logits give."""
    head_vD = head_vD.astype(dtype)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits_Cv = product("cd,vd->cv", x_CD.astype(dtype), head_vD)
    hit_Cv = targets_C[:, None] == jnp.arange(len(head_vD))
    dlogits_Cv = jnp.exp(logits_Cv - log_z_C[:, None]) - hit_Cv
    return product("cv,vd->cd", dlogits_Cv.astype(dtype), head_vD)


def _flat(hidden: Hidden, batches: Sequence[Batch]):
    """(hidden states of all valid tokens, their targets, which tokens of each batch are valid)."""
    valid = [batch["segment_ids"] > 0 for batch in batches]
    x_TD = np.concatenate([x_BLD[v] for x_BLD, v in zip(hidden, valid, strict=True)])
    targets_T = np.concatenate([b["targets"][v] for b, v in zip(batches, valid, strict=True)])
    return x_TD, targets_T, valid


def _chunks(size: int, most: int) -> list[slice]:
    """Slices of about equal sizes."""
    each = -(-size // max(1, -(-size // most)))
    return [slice(first, first + each) for first in range(0, size, max(1, each))]
