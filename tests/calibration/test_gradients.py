"""Importance by gradients, swept from the top down: finite differences, and a model as a whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynmoe_jax.calibration import STATISTICS, Statistics, gather
from dynmoe_jax.calibration.statistics.gradient_importance import GradientImportance
from dynmoe_jax.model.stacks import stacks_of
from tests.close import assert_close

BOUND = 1 << 30
NEW = Statistics("model", "text")
UNITS = (0, 7, 23)


def norm(x_LD, scale):
    return x_LD / np.sqrt((x_LD**2).mean(-1, keepdims=True) + 1e-6) * scale


def rotated(x_LHW):
    half = x_LHW.shape[-1] // 2
    angle = np.arange(len(x_LHW))[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = x_LHW[..., :half], x_LHW[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attention(p, x_LD):
    query, key, value = (
        np.einsum("ld,dhw->lhw", x_LD, p[name]) for name in ("query_DHW", "key_DGW", "value_DGW")
    )
    times = query.shape[1] // key.shape[1]
    query, key = rotated(query), np.repeat(rotated(key), times, 1)
    scores = np.einsum("lhw,mhw->hlm", query, key) / np.sqrt(query.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hlm,mhw,hwd->ld", weights, np.repeat(value, times, 1), p["output_HWD"])


def loss(params, tokens, targets, change=None):
    """(sum of losses, hidden units of each layer) of one row of a dense model, in float64.

    ``change``: (layer, token, unit, what is added to it).
    """
    x, hidden = params["embedding_VD"][tokens], []
    for number, p in enumerate(params["layers"]):
        x = x + attention(p["attention"], norm(x, p["attention_norm"]["scale"]))
        gate_up = norm(x, p["feed_forward_norm"]["scale"]) @ p["feed_forward"]["gate_up_D2F"]
        gate, up = np.split(gate_up, 2, -1)
        h = gate / (1 + np.exp(-gate)) * up
        hidden.append(h)
        if change and change[0] == number:
            h = h.copy()
            h[change[1], change[2]] += change[3]
        x = x + h @ p["feed_forward"]["down_FD"]
    logits = norm(x, params["norm"]["scale"]) @ params["head_DV"]
    log_z = np.log(np.exp(logits).sum(-1))
    return (log_z - logits[np.arange(len(targets)), targets]).sum(), hidden


def in_float64(decoder):
    whole = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(decoder)))
    stack = whole.pop("groups")["layers"][0]
    count = len(stack["attention_norm"]["scale"])
    return {**whole, "layers": [jax.tree.map(lambda x, n=n: x[n], stack) for n in range(count)]}


def test_gradient_importance_is_that_of_finite_differences(on_disk, batches, monkeypatch):
    # Parts of the vocabulary and of the tokens that don't divide them.
    monkeypatch.setattr("dynmoe_jax.calibration.logits.COLUMNS_AT_ONCE", 12)
    monkeypatch.setattr("dynmoe_jax.calibration.logits.TOKENS_AT_ONCE", 5)
    run = on_disk(every_n_layers=0)
    found = gather(run, batches, {"gradient_importance"}, BOUND, NEW)
    params, step = in_float64(run.decoder), 1e-5
    sums, tokens = np.zeros((2, len(UNITS))), 0
    for batch in batches:
        for row in range(2):
            length = int((batch["segment_ids"][row] > 0).sum())
            text = batch["tokens"][row, :length], batch["targets"][row, :length]
            _, hidden = loss(params, *text) if length else (0, None)
            tokens += length
            for layer, at, place in np.ndindex(2, length, len(UNITS)):
                change = layer, at, UNITS[place]
                more, less = (loss(params, *text, (*change, s))[0] for s in (step, -step))
                sums[layer, place] += abs(hidden[layer][change[1:]] * (more - less) / (2 * step))
    for layer in range(2):
        assert_close(found["gradient_importance", layer][list(UNITS)], sums[layer] / tokens, 1e-4)


@dataclasses.dataclass(frozen=True)
class SignedImportance(GradientImportance):
    """Mean of ``h dL/dh``, which a gradient by the last matrix tells as well."""

    def of_rows(self, rows):
        """Adds up products."""
        return rows.summed(rows.hidden_RF * rows.gradient_RF)


def test_gradients_of_experts_are_those_of_the_whole_model(on_disk, batches):
    """With routers that read the layer before; and a statistic of one's own is one class."""
    router = {"router": "moe_plus_plus", "top_p": {}, "backend": "reference"}
    shared = {"shared_hidden_width": 8, "routed_scale": 2.0, "unroll": 1}
    run = on_disk(num_layers=4, every_n_layers=2, **router, **shared)
    with STATISTICS.temporarily("signed_importance", SignedImportance):
        found = gather(run, batches, {"signed_importance"}, BOUND, NEW)
    structure, params = nnx.split(run.decoder)

    @jax.jit
    @jax.grad
    def gradient(params, batch):
        decoder = nnx.merge(structure, params)
        logits = decoder(batch["tokens"], batch["segment_ids"], batch["positions"]).logits
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)
        return -jnp.sum(jnp.where(batch["segment_ids"] > 0, log_p[..., 0], 0.0))

    total = jax.tree.map(lambda *x: sum(x), *(gradient(params, batch) for batch in batches))
    by_layer = products_by_layer(run, params, total)
    for layer, array in found.by_layer("signed_importance").items():
        rows = found.arrays.get(("routed_tokens", layer))
        if rows is None:
            rows = sum(int((batch["segment_ids"] > 0).sum()) for batch in batches)
        assert_close(array, by_layer[layer] / np.asarray(rows)[..., None], 1e-4)
    assert found.by_layer("signed_importance").keys() == set(range(run.config.model.num_layers))


def products_by_layer(run, params, gradients):
    """Each layer's last matrix times its gradient, summed over D."""
    found, flat = {}, dict(gradients.flat_state())
    for path, leaf in params.flat_state():
        if path[-1] not in ("down_FD", "down_EFD"):
            continue
        stack = next(each for each in stacks_of(run.config.model) if each.name == path[0])
        products = np.sum(np.asarray(leaf[...]) * np.asarray(flat[path][...]), -1)
        found |= dict(zip(stack.layers_at(path[2]), products, strict=True))
    return found
