"""Texts of a model whose routers see the earlier tokens of a row: each is read by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.evaluation.scoring.requests import Request
from dynmoe_jax.evaluation.scoring.scoring import Scorer
from dynmoe_jax.evaluation.scoring.tree_writing import Prompt, TreeWriter
from dynmoe_jax.model import Decoder

VOCAB = 32


@pytest.fixture(scope="module")
def decoder():
    model = config.Model(
        num_layers=1,
        width=8,
        num_heads=2,
        num_kv_heads=1,
        head_width=4,
        vocab_size=VOCAB,
        max_seq_len=32,
        kernels="plain",
        moe=config.MoE(
            num_experts=4,
            hidden_width=8,
            router="seq_top_k",
            seq_top_k={"k": 1, "extra": 3},
            allow_non_causal=True,
        ),
    )
    structure, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), shapes)
    return nnx.merge(structure, drawn)


@pytest.fixture(scope="module")
def texts():
    """Texts that begin alike, for which a tree would be made."""
    random = np.random.default_rng(1)
    shared = random.integers(0, VOCAB, 20).tolist()
    return [(*shared, *random.integers(0, VOCAB, n).tolist()) for n in (3, 6, 1)]


@pytest.fixture(scope="module")
def plainly(decoder):
    """(text) -> (log p of what follows each token, experts of each token)."""
    run = jax.jit(lambda tokens: decoder(tokens[None]))

    def read(text):
        output = run(np.pad(np.array(text), (0, 40 - len(text))))
        log_probs_LV = np.asarray(jax.nn.log_softmax(output.logits[0]))
        return log_probs_LV, np.asarray(output.routing.experts_per_token)[0, 0]

    return read


def test_scores_are_those_of_each_text_by_itself(decoder, texts, plainly):
    scorer = Scorer(decoder, 512, 64)
    requests = [Request(text, len(text) - 1) for text in texts]
    answers = dict(pair for batch in scorer.answer(requests) for pair in batch)
    for i, text in enumerate(texts):
        log_probs_LV, used_L = plainly(text)
        wanted = sum(log_probs_LV[n, token] for n, token in enumerate(text[1:]))
        np.testing.assert_allclose(answers[i].log_prob, wanted, atol=1e-4)
        np.testing.assert_array_equal(answers[i].experts_L, used_L[: len(text) - 1])
    assert scorer.tokens_read == scorer.tokens_asked


def test_texts_are_those_of_each_prompt_by_itself(decoder, texts, plainly):
    writer = TreeWriter(decoder, 512, VOCAB, -1)
    asked = [Prompt(text, 5, lambda ids: None) for text in texts]
    found = dict(pair for batch in writer.write(asked) for pair in batch)
    for i, text in enumerate(texts):
        tokens = list(text)
        for _ in range(5):
            log_probs_LV, used_L = plainly(tokens)
            tokens.append(int(np.argmax(log_probs_LV[len(tokens) - 1])))
        assert found[i].ids == tokens[len(text) :]
        np.testing.assert_array_equal(found[i].experts_L, used_L[: len(tokens) - 1])
