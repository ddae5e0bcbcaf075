"""DS-MoE: all experts in training, few at inference, and the mutual-information loss."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.inference.generate import Generator
from dynmoe_jax.inference.sampling import Sampling
from dynmoe_jax.model import Decoder, decoder_structure
from dynmoe_jax.model.feed_forward import MoEFeedForward
from dynmoe_jax.model.inputs import TokenPositions, TrainingInput
from dynmoe_jax.registry import LOSSES
from dynmoe_jax.routing import RouterInput
from dynmoe_jax.routing.routers import Dense
from dynmoe_jax.training.loss import TrainingLoss

T, E, V, L = 12, 5, 16, 16


def draw(seed=0, *shape):
    return np.random.default_rng(seed).normal(size=shape or (T, E)).astype(np.float32)


def decide(logits_TE, training=False, **settings):
    valid_T = jnp.arange(T) != 4
    return Dense(**settings)({}, RouterInput(None, logits_TE, valid_T, training=training))


def softmax(z_TE):
    e_TE = np.exp(z_TE - z_TE.max(axis=-1, keepdims=True))
    return e_TE / e_TE.sum(axis=-1, keepdims=True)


def by_expert(routing):
    weight_TE = np.zeros((T, E + 1))
    np.put_along_axis(weight_TE, np.asarray(routing.expert_TK), routing.weight_TK, axis=1)
    return weight_TE[:, :E]


@pytest.mark.parametrize("settings", [{}, {"k": 2}, {"threshold": 0.3}, {"threshold": 0.9}])
def test_all_experts_in_training_and_those_that_are_asked_for_at_inference(settings):
    logits_TE = draw() * 2
    probs_TE = softmax(logits_TE.astype(np.float64))
    probs_TE[4] = 0
    in_training = decide(logits_TE, training=True, **settings)
    np.testing.assert_allclose(by_expert(in_training), probs_TE, rtol=1e-5)
    assert in_training.experts_per_token_T.tolist() == [E] * 4 + [0] + [E] * (T - 5)
    kept_TE = probs_TE >= settings.get("threshold", 0)
    if "k" in settings:
        kept_TE = probs_TE >= np.sort(probs_TE, axis=1)[:, -2:-1]
    few = decide(logits_TE, **settings)
    np.testing.assert_allclose(by_expert(few), np.where(kept_TE, probs_TE, 0), rtol=1e-5)
    assert few.slots == {"": E, "k": 2, "threshold": int(1 / settings.get("threshold", 1))}[
        next(iter(settings), "")
    ]  # fmt: skip


def test_settings_that_cannot_be_met_are_refused():
    assert Dense(k=9).obstacle(8) == "k=9 must be at most config.model.moe.num_experts=8"
    assert Dense(k=2, threshold=0.1).obstacle(8).startswith("threshold=0.1 must be 0 where k=2")


def mutual_information(logits_NTE):
    """The loss of each layer, in plain numpy."""
    probs_NTE = softmax(logits_NTE)
    entropy = lambda p: -np.sum(p * np.log(np.maximum(p, 1e-300)), axis=-1)  # noqa: E731
    return entropy(probs_NTE).mean(axis=-1) - entropy(probs_NTE.mean(axis=-2))


def loss_of(logits_TE):
    seen = RouterInput(None, jnp.asarray(logits_TE), jnp.ones(len(logits_TE), bool), training=True)
    loss = LOSSES["mutual_information"]()
    return loss.value(loss.sums(Dense()({}, seen), seen, {}), jnp.float32(len(logits_TE)))


def test_the_loss_is_zero_if_uniform_and_the_logarithm_of_e_if_balanced_and_sure():
    sure_TE = 60.0 * np.eye(E, dtype=np.float32)[np.arange(4 * E) % E]
    np.testing.assert_allclose(loss_of(np.zeros((T, E), np.float32)), 0.0, atol=1e-6)
    np.testing.assert_allclose(loss_of(sure_TE), -np.log(E), rtol=1e-6)
    for seed in range(5):
        logits_TE = 3 * draw(seed)
        loss = float(loss_of(logits_TE))
        assert -np.log(E) <= loss <= 0
        np.testing.assert_allclose(loss, mutual_information(logits_TE.astype(float)), rtol=1e-4)


def test_each_layer_is_balanced_by_itself():
    # All tokens of one layer are sure of one expert, those of the other of another one.
    collapsed_NTE = 60.0 * np.broadcast_to(np.eye(2)[:, None], (2, T, 2))
    losses_N = [loss_of(layer_TE.astype(np.float32)) for layer_TE in collapsed_NTE]
    np.testing.assert_allclose(losses_N, 0.0, atol=1e-6)


def test_gradient_of_the_loss_is_its_slope():
    logits_TE, along_TE = draw(), draw(1).astype(float)
    slope = np.sum(np.asarray(jax.grad(loss_of)(jnp.asarray(logits_TE)), float) * along_TE)
    ends = [mutual_information(logits_TE + sign * 1e-6 * along_TE) for sign in (1, -1)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-4)


def model_of(router="dense", **settings):
    moe = config.MoE(
        router=router, num_experts=E, hidden_width=8, backend="reference", **{router: settings}
    )
    return config.Model(
        num_layers=1,
        width=16,
        num_heads=2,
        num_kv_heads=2,
        head_width=8,
        vocab_size=V,
        max_seq_len=L,
        init_std=0.3,
        kernels="plain",
        moe=moe,
    )


def test_every_expert_learns_from_every_batch_unlike_those_that_are_chosen():
    def gradients(model, tokens):
        layer = MoEFeedForward(model, rngs=nnx.Rngs(0))
        structure, params = nnx.split(layer)
        training = TrainingInput((), None, jnp.arange(1))
        positions = TokenPositions(jnp.ones((1, tokens), jnp.int32), None, training=training)

        def loss(params):
            layer = nnx.merge(structure, params)
            y_TD, _ = layer(draw(1, tokens, 16), draw(2, tokens, E), positions)
            return jnp.sum(y_TD**2)

        found = jax.jit(jax.grad(loss))(params)
        return [np.abs(found[name][...]).sum(axis=(1, 2)) for name in ("gate_up_ED2F", "down_EFD")]

    for name_E in gradients(model_of(), 1):
        assert np.all(name_E > 0)
    for name_E in gradients(model_of("top_k", k=2), 1):
        assert np.sum(name_E > 0) == 2


def test_with_all_experts_generation_is_the_forward_pass_of_training():
    decoder = Decoder(model_of(k=E), rngs=nnx.Rngs(0))
    written = Generator(decoder, copy_layers=False).write(
        [[1, 2, 3]], [5], Sampling(temperature=0.0), vocab_size=V, stop_ids=[]
    )[0]
    assert np.all(written.experts_nN == E)
    tokens_BL = jnp.asarray([[1, 2, 3, *written.ids]])
    ones_BL = jnp.ones_like(tokens_BL)
    at_BL = jnp.arange(tokens_BL.shape[1])[None]
    training = TrainingInput((), None, jnp.arange(1))

    @nnx.jit
    def forward(decoder):
        x_BLD, _ = decoder.tapped(tokens_BL, ones_BL, at_BL, lambda output: 0, training)
        return decoder.logits(x_BLD)[0]

    logits_LV = forward(decoder)
    np.testing.assert_array_equal(jnp.argmax(logits_LV[2:-1], axis=-1), written.ids)
    # Likewise with a threshold of 0, and unlike it with fewer experts.
    same = []
    for settings in ({}, {"k": 2}):
        other = nnx.merge(decoder_structure(model_of(**settings)), nnx.state(decoder))
        logits = nnx.jit(lambda decoder: decoder(tokens_BL).logits[0])(other)
        same.append(np.allclose(logits, logits_LV, rtol=1e-4, atol=1e-5))
    assert same == [True, False]


def test_the_loss_makes_few_experts_do_as_well_as_all():
    """A gap of losses between 2 of 5 experts (0.4 E) and all, with alpha and without it."""
    model = model_of()
    cfg = dataclasses.replace(
        config.Config(), model=model, data=config.Data(seq_len=L), train=config.Train(batch_size=16)
    )
    structure = decoder_structure(model)
    loss = TrainingLoss.of(cfg, Decoder(model, rngs=nnx.Rngs(0)))
    few = decoder_structure(model_of(k=2))
    adam = optax.adam(1e-2)
    # A Markov source: three tokens may follow each one.
    follow_VS = np.argsort(draw(7, V, V), axis=1)[:, :3]

    def batch_of(key):
        first_B, *keys = jax.random.split(key, L + 1)
        at_B = jax.random.randint(first_B, (16,), 0, V)
        tokens = [at_B]
        for key in keys:
            step_B = jax.random.randint(key, (16,), 0, 3)
            tokens.append(jnp.asarray(follow_VS)[tokens[-1], step_B])
        tokens_BL = jnp.stack(tokens, axis=1)
        ones_BL = jnp.ones((16, L), jnp.int32)
        return {
            "tokens": tokens_BL[:, :-1],
            "targets": tokens_BL[:, 1:],
            "segment_ids": ones_BL,
            "positions": jnp.arange(L) * ones_BL,
        }

    def total(params, batch, alpha):
        sums = loss.sums(nnx.merge(structure, params), batch)
        zero = dict.fromkeys(loss.routing.weights, 0.0)
        return loss.value(sums, zero | {"mutual_information": alpha})[0]

    def gap(seed, alpha):
        params = nnx.state(Decoder(model, rngs=nnx.Rngs(jax.random.key(seed))))

        def step(carry, key):
            params, moments = carry
            updates, moments = adam.update(jax.grad(total)(params, batch_of(key), alpha), moments)
            return (optax.apply_updates(params, updates), moments), None

        keys = jax.random.split(jax.random.key(seed), 120)
        (params, _), _ = jax.lax.scan(step, (params, adam.init(params)), keys)
        batch = batch_of(jax.random.key(99))
        nll = partial(_cross_entropy, params, batch)
        return nll(few) - nll(structure)

    gaps = jax.jit(jax.vmap(jax.vmap(gap, (None, 0)), (0, None)))(
        jnp.arange(3), jnp.array([0.0, 0.1])
    )
    without, with_loss = np.asarray(gaps).T
    assert np.all(with_loss < without), gaps
    assert with_loss.mean() < 0.5 * without.mean(), gaps


def _cross_entropy(params, batch, structure):
    decoder = nnx.merge(structure, params)
    logits_BLV = decoder(batch["tokens"]).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits_BLV, batch["targets"]).mean()
