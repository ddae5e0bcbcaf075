"""A decoder of six layers with four expert counts, hidden widths and arrangements of heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.model import Decoder, parameter_shapes
from dynmoe_jax.model.flops import forward_flops
from dynmoe_jax.model.kv_cache import decode_step, prefill, unstacked, unstacked_cache, with_room
from dynmoe_jax.model.parameters import active_parameters, count_parameters
from dynmoe_jax.model.stacks import stacks_of
from dynmoe_jax.model.walk import walk
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing import TopP
from dynmoe_jax.training.router_states import with_next_states
from tests.close import assert_close

B, L, D, V = 2, 8, 16, 32
LAYERS = (
    "2-3:moe.num_experts=6,moe.hidden_width=20;"
    "4:moe.num_experts=8,moe.hidden_width=8,num_heads=2,head_width=8;"
    "5:moe.num_experts=2,moe.hidden_width=16,num_kv_heads=4"
)
EXPERTS, WIDTHS = (4, 4, 6, 6, 8, 2), (12, 12, 20, 20, 8, 16)
HEADS = ((4, 2, 4),) * 4 + ((2, 2, 8), (4, 4, 4))
"""(query heads, key/value heads, width) of each layer."""

P = 0.6
TOKENS = np.random.default_rng(0).integers(0, V, (B, L))


@pytest.fixture(scope="module")
def model(small):
    return small(num_layers=6, layers=LAYERS, backend="auto")


@pytest.fixture(scope="module")
def decoder(model, draw):
    return draw(model)


@pytest.fixture(scope="module")
def output(decoder, run):
    return run(decoder, TOKENS, np.ones_like(TOKENS), np.broadcast_to(np.arange(L), (B, L)))


# ── The twin: the same six layers, one after another ─────────────────────────────────────────────


def norm(x_BLD, scale_D):
    return x_BLD / np.sqrt(np.mean(x_BLD**2, -1, keepdims=True) + 1e-6) * scale_D


def rotated(x_BLHW):
    half = x_BLHW.shape[-1] // 2
    angle = np.arange(L)[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = x_BLHW[..., :half], x_BLHW[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def softmax(x):
    exp = np.exp(x - x.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def attention(p, x_BLD):
    query, key, value = (
        np.einsum("bld,dhw->blhw", x_BLD, p[name]) for name in ("query_DHW", "key_DGW", "value_DGW")
    )
    times = query.shape[2] // key.shape[2]
    query, key = rotated(query), rotated(key)
    key, value = np.repeat(key, times, 2), np.repeat(value, times, 2)
    scores = np.einsum("blhw,bmhw->bhlm", query, key) / np.sqrt(query.shape[-1])
    scores = np.where(np.tril(np.ones((L, L), bool)), scores, -np.inf)
    return np.einsum("bhlm,bmhw,hwd->bld", softmax(scores), value, p["output_HWD"])


def swiglu(x, gate_up, down):
    gate, up = np.split(x @ gate_up, 2, -1)
    return gate / (1 + np.exp(-gate)) * up @ down


def experts(p, x_BLD):
    """(what they add, how many each token used)."""
    probs_BLE = softmax(x_BLD @ p["router_DE"])
    order = np.argsort(-probs_BLE, -1)
    mass = np.cumsum(np.take_along_axis(probs_BLE, order, -1), -1)
    before = np.concatenate([np.zeros((B, L, 1)), mass[..., :-1]], -1)
    chosen_BLE = np.take_along_axis(before <= P, np.argsort(order, -1), -1)
    parts = zip(p["gate_up_ED2F"], p["down_EFD"], strict=True)
    outputs_BLED = np.stack([swiglu(x_BLD, *weights) for weights in parts], 2)
    return np.einsum("ble,bled->bld", probs_BLE * chosen_BLE, outputs_BLED), chosen_BLE.sum(-1)


def layers_of(decoder):
    """Parameters of the layers one after another, as plain arrays by name."""
    for stack in decoder.stacks:
        state = nnx.to_pure_dict(nnx.state(stack))["layers"]
        period = [state[i] for i in sorted(state)]
        for repeat in range(len(period[0]["attention_norm"]["scale"])):
            yield from (
                jax.tree.map(lambda x, r=repeat: np.asarray(x[r], np.float64), layer)
                for layer in period
            )


@pytest.fixture(scope="module")
def twin(decoder):
    """(logits, experts of each token in each layer)."""
    x_BLD, used = np.asarray(decoder.embedding_VD[...], np.float64)[TOKENS], []
    for layer in layers_of(decoder):
        x_BLD = x_BLD + attention(layer["attention"], norm(x_BLD, layer["attention_norm"]["scale"]))
        y_BLD, used_BL = experts(
            layer["feed_forward"], norm(x_BLD, layer["feed_forward_norm"]["scale"])
        )
        x_BLD, used = x_BLD + y_BLD, [*used, used_BL]
    x_BLD = norm(x_BLD, np.asarray(decoder.norm.scale[...]))
    return x_BLD @ np.asarray(decoder.head_DV[...]), np.stack(used)


# ── Tests ────────────────────────────────────────────────────────────────────────────────────────


def test_logits_and_choices_are_those_of_the_unrolled_twin(output, twin):
    assert_close(output.logits, twin[0], 1e-5)
    np.testing.assert_array_equal(output.routing.experts_per_token, twin[1])


def test_records_are_padded_and_say_which_experts_exist(output):
    np.testing.assert_array_equal(output.routing.exists_NE.sum(-1), EXPERTS)
    probs_NBLE = np.asarray(output.routing.probs)
    exists_NBLE = np.asarray(output.routing.exists_NE)[:, None, None]
    assert not np.any(np.where(exists_NBLE, 0, probs_NBLE))
    np.testing.assert_allclose(probs_NBLE.sum(-1), 1, rtol=1e-5)


def test_stacks_are_the_runs_of_equal_layers(model):
    assert [(stack.name, stack.first) for stack in stacks_of(model)] == [
        ("stack_0", 0),
        ("stack_1", 2),
        ("stack_2", 4),
    ]
    shapes = {path: leaf.shape for path, leaf in parameter_shapes(model).flat_state()}
    assert shapes["stack_1", "layers", 0, "feed_forward", "down_EFD"] == (2, 6, 20, D)
    assert shapes["stack_2", "layers", 1, "attention", "key_DGW"] == (1, D, 4, 4)


def test_equal_layers_keep_their_stacks(small):
    names = [stack.name for stack in stacks_of(small(num_layers=5, dense_first_layers=1))]
    assert names == ["first_groups", "groups"]


def test_walk_gives_every_layer_with_its_number(decoder, twin):
    batch = {
        "tokens": TOKENS,
        "segment_ids": np.ones_like(TOKENS),
        "positions": np.broadcast_to(np.arange(L), (B, L)),
    }
    taps = lambda output: output.routing.experts_per_token_T  # noqa: E731
    for number, used_T in walk(decoder, batch, taps):
        np.testing.assert_array_equal(used_T.reshape(B, L), twin[1][number])
    assert number == 5


@pytest.mark.parametrize("apart", [False, True])
def test_cache_of_layers_with_unlike_heads(decoder, twin, apart):
    known = L - 2

    @nnx.jit
    def last_positions(decoder):
        start_B = jnp.zeros(B, jnp.int32)
        _, cache, _ = prefill(decoder, TOKENS[:, :known], start_B)
        cache, stacks = with_room(cache, L), [nnx.split(stack)[1] for stack in decoder.stacks]
        if apart:
            cache, stacks = unstacked_cache(cache), unstacked(decoder)
        valid = np.ones((B, L - known), bool)
        x_BCD, _, used = decode_step(decoder, stacks, TOKENS[:, known:], valid, cache)
        return decoder.logits(x_BCD), used

    logits_BCV, used_NBC = last_positions(decoder)
    assert_close(logits_BCV, twin[0][:, known:], 1e-5)
    np.testing.assert_array_equal(used_NBC, twin[1][:, :, known:])


def test_flops_are_the_sums_over_layers(model):
    rows = [30, 20, 40, 10, 50, 60]
    wanted = B * L * 2 * D * V
    for (heads, kv_heads, width), e, f, n in zip(HEADS, EXPERTS, WIDTHS, rows, strict=True):
        projections = 2 * D * width * (2 * heads + 2 * kv_heads)
        wanted += B * L * (projections + 2 * L * heads * width + 2 * D * e) + n * 6 * D * f
    assert forward_flops(model, B * L, L, rows) == pytest.approx(wanted, rel=1e-12)


def test_active_parameters_are_the_sums_over_layers(model):
    used = [2.5, 1.0, 3.0, 2.0, 4.0, 1.5]
    sizes = [3 * D * f for f in WIDTHS]
    unused = sum((e - k) * size for e, k, size in zip(EXPERTS, used, sizes, strict=True))
    assert active_parameters(model, used) == count_parameters(model) - unused
    every = sum((e - 2) * size for e, size in zip(EXPERTS, sizes, strict=True))
    assert active_parameters(model, 2) == count_parameters(model) - every


@dataclasses.dataclass(frozen=True)
class Counting(TopP):
    """Top-P that counts tokens by expert, and in its state the place among the layers told."""

    def initial_state(self, num_experts):
        return {"seen_E": jnp.zeros(num_experts), "place": jnp.zeros(())}

    def measure(self, params, given, routing):
        return {"load_E": routing.load_E}

    def next_state(self, params_N, state_N, seen_N):
        places = jnp.arange(len(seen_N["load_E"]), dtype=jnp.float32)
        return {"seen_E": state_N["seen_E"] + seen_N["load_E"], "place": places}, None


def test_states_of_unlike_layers_are_told_in_the_order_of_layers(small):
    """Layers 0, 2 and 1, 3 are computed by two programs; 4 and 5 have other numbers of experts."""
    with ROUTERS.temporarily("counting", Counting):
        base = small(num_layers=6)
        moe = config.MoE(num_experts=4, hidden_width=12, router="counting")
        layers = "1,3:moe.hidden_width=20;4-5:moe.num_experts=3"
        model = config.Model(
            **{f.name: getattr(base, f.name) for f in dataclasses.fields(base) if f.name != "moe"}
            | {"layers": layers},
            moe=moe,
        )
        decoder = nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0)))
        assert [list(numbers) for numbers in decoder.moe_layers] == [[0, 2], [1, 3], [4, 5]]
        structure, shapes = nnx.split(decoder)
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
        measured = [
            {"load_E": jnp.asarray(numbers)[:, None] * jnp.ones((1, experts))}
            for numbers, experts in zip(decoder.moe_layers, (4, 4, 3), strict=True)
        ]
        params, revised = with_next_states(structure, params, measured)
        assert revised is None
        decoder = nnx.merge(structure, params)
        states = [layer.feed_forward for stack in decoder.stacks for layer in stack.layers]
        assert [s.place[...].tolist() for s in states] == [[0, 2], [1, 3], [0, 1]]
        for state, numbers in zip(states, decoder.moe_layers, strict=True):
            np.testing.assert_array_equal(state.seen_E[...][:, 0], list(numbers))
