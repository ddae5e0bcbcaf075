"""Texts of an ensemble, beside full forward passes and Bayes' rule by hand."""

import dataclasses
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.inference.ensemble.generate import Ensemble, EnsembleGenerator
from dynmoe_jax.inference.sampling import Sampling
from dynmoe_jax.inference.writer import Writer
from dynmoe_jax.model import decoder_structure, parameter_shapes

PRIOR_J = np.array([0.6, 0.4])
PROMPTS = [[0, 5, 9, 3, 7], [0, 4]]
TOKENS = 6


@pytest.fixture(scope="module")
def members(decoder):
    """A model with experts in two layers, and a narrower one, dense, with more rows than tokens."""
    dense = {"num_layers": 1, "width": 4, "head_width": 2, "vocab_size": 44, "max_seq_len": 40}
    moe = config.MoE(every_n_layers=0)
    model = dataclasses.replace(decoder.config, moe=moe, **dense)
    random = np.random.default_rng(5)
    draw = lambda x: jnp.asarray(random.normal(scale=1.5, size=x.shape), jnp.float32)  # noqa: E731
    params = jax.tree.map(draw, parameter_shapes(model))
    return decoder, nnx.merge(decoder_structure(model), params)


def by_hand(members, prompt, written, top_k):
    """(most probable token, posterior) at each place of a text, in float64 by whole products."""
    text = [*prompt, *written]
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(text)] = text
    probs = []
    for decoder in members:
        logits_LV = np.asarray(decoder(padded).logits[0], np.float64)
        probs.append(np.exp(logits_LV) / np.exp(logits_LV).sum(-1, keepdims=True))
    found = []
    for end in range(len(prompt), len(text)):
        likelihood = [np.prod([p[i, text[i + 1]] for i in range(end - 1)]) for p in probs]
        joint_J = PRIOR_J * likelihood
        if top_k:
            joint_J = joint_J * (joint_J == joint_J.max())
        posterior_J = joint_J / joint_J.sum()
        mixed_V = sum(w * p[end - 1, :33] for w, p in zip(posterior_J, probs, strict=True))
        found.append((int(mixed_V.argmax()), posterior_J))
    return found


@pytest.mark.parametrize(("top_k", "copy_layers"), [(0, True), (1, False)])
def test_greedy_text_is_that_of_the_mixture(members, top_k, copy_layers):
    ensemble = Ensemble(members, np.log(PRIOR_J), top_k)
    generator = EnsembleGenerator(ensemble, copy_layers=copy_layers)
    assert generator.room == 40
    found = generator.write(
        PROMPTS, [TOKENS] * 2, Sampling(temperature=0.0), vocab_size=33, stop_ids=[]
    )
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        expected = by_hand(members, prompt, continuation.ids, top_k)
        assert continuation.ids.tolist() == [token for token, _ in expected]
        posterior_nJ = np.array([posterior for _, posterior in expected])
        np.testing.assert_allclose(continuation.posterior_nJ, posterior_nJ, atol=2e-5)
        np.testing.assert_allclose(continuation.posterior_nJ.sum(1), 1, rtol=1e-5)
        assert continuation.experts_nN.shape == (TOKENS, 2)  # of the member that has experts
    moved = found[0].posterior_nJ
    # What is written says something about its domain, where both members have a say.
    assert top_k or np.abs(moved - moved[0]).max() > 0.01


def test_an_ensemble_of_one_model_twice_writes_what_it_writes(decoder, letters):
    sampling = Sampling(temperature=0.9, max_tokens=8, seed=3)
    alone = Writer(decoder, letters, sampling).write(["hello", "so"], 2)
    pair = Ensemble((decoder, decoder), np.log(PRIOR_J))
    together = Writer(pair, letters, sampling).write(["hello", "so"], 2)
    for one, both in zip(*map(chain.from_iterable, (alone, together)), strict=True):
        assert both.text == one.text
        assert one.posterior_nJ.shape == (len(one.ids), 0)
        np.testing.assert_allclose(
            both.posterior_nJ, np.tile(PRIOR_J, (len(both.ids), 1)), rtol=1e-5
        )
