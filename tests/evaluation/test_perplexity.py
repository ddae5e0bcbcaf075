"""Windows over long documents, and bits per byte, against a plain forward pass."""

import gzip
import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmoe_jax import config
from dynmoe_jax.data.sources.document import Broken, Document
from dynmoe_jax.data.sources.registry import read_documents
from dynmoe_jax.evaluation.harness.answers import AnswerFile
from dynmoe_jax.evaluation.perplexity import DomainText, check_stride, measure, to_record, windows

LONG = "Every token is predicted once. " * 20


def test_windows_by_hand():
    # BOS is 9; a window reads 4 tokens, and the next one predicts 2 more.
    found = list(windows([9, 1, 2, 3, 4, 5, 6, 7], window=4, stride=2))
    assert [request.tokens for request in found] == [
        (9, 1, 2, 3, 4),
        (2, 3, 4, 5, 6),
        (3, 4, 5, 6, 7),
    ]
    assert [request.scored for request in found] == [4, 2, 1]
    assert [request.counted for request in found] == [4, 2, 1]
    assert list(windows([9], 4, 2)) == []


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_every_token_is_predicted_once_from_enough_context(length, window, data):
    stride = data.draw(st.integers(1, window))
    predicted = []
    for request in windows(list(range(length + 1)), window, stride):
        assert len(request.read) <= window
        predicted += request.tokens[-request.scored :]
        # Tokens are their own positions here: how many come before the first that is predicted?
        context = len(request.tokens) - request.scored
        first = request.tokens[-request.scored]
        assert context >= min(first, window - stride if predicted[0] != first else 1)
    assert predicted == list(range(1, length + 1))


@pytest.fixture
def answers(tmp_path):
    return AnswerFile(tmp_path / "answers.jsonl", "model")


@pytest.fixture(scope="module")
def nll_plainly(decoder):
    """tokens -> -log p of each token after the first, from one pass over all of them."""
    run = jax.jit(lambda tokens: jax.nn.log_softmax(decoder(tokens[None]).logits[0]))

    def nll(tokens):
        # Padding behind a text changes nothing in it, and few lengths are compiled.
        log_probs = np.asarray(run(np.pad(np.array(tokens), (0, -len(tokens) % 128))))
        return -log_probs[np.arange(len(tokens) - 1), tokens[1:]]

    return nll


def test_short_documents_are_one_plain_forward(nll_plainly, tokenizer, make_scorer, answers):
    documents = [Document("A short text.", "one", "a"), Document("Ünother, 数", "two", "b")]
    documents.append(Document(LONG, "one", "c"))
    found = measure(documents, make_scorer(512), tokenizer, answers, stride=512)
    for name in ("one", "two"):
        texts = [d.text for d in documents if d.domain == name]
        ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
        nll = np.concatenate([nll_plainly(tokens) for tokens in ids])
        domain = found[name]
        assert (domain.documents, domain.tokens) == (len(texts), len(nll))
        np.testing.assert_allclose(domain.nll, nll.sum(), rtol=1e-5)
        bits = nll.sum() / math.log(2) / sum(len(text.encode()) for text in texts)
        np.testing.assert_allclose(domain.bits_per_byte, bits, rtol=1e-5)
        np.testing.assert_allclose(domain.perplexity, np.exp(nll.mean()), rtol=1e-5)


def test_long_document_in_windows(nll_plainly, tokenizer, make_scorer, answers, plain):
    window, stride = 64, 24
    (domain,) = measure(
        [Document(LONG, "d", "x")], make_scorer(window), tokenizer, answers, stride=stride
    ).values()
    tokens = [tokenizer.bos_id, *tokenizer.encode(LONG).tolist()]
    assert len(tokens) > 3 * window
    # Each token by a pass of its own, over the tokens that its window holds before it.
    wanted, experts, start = 0.0, 0, 0
    for target in range(1, len(tokens)):
        if target > window and (target - window - 1) % stride == 0:
            end = min(target + stride - 1, len(tokens) - 1)
            start = end - window
        part = tokens[start:target]
        wanted += nll_plainly([*part, tokens[target]])[-1]
    np.testing.assert_allclose(domain.nll, wanted, rtol=1e-5)
    for request in windows(tokens, window, stride):
        experts = experts + plain(request)[2][:, -request.scored :].sum(axis=1)
    np.testing.assert_array_equal(domain.experts_N, experts)
    np.testing.assert_allclose(domain.experts_by_layer, experts / (len(tokens) - 1))


def test_limit_and_broken_records(tokenizer, make_scorer, answers, tmp_path, capsys):
    lines = [{"text": f"text {i}", "domain": "a"} for i in range(5)]
    raw = "".join(json.dumps(line) + "\n" for line in lines) + "{broken\n"
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(raw.encode()))
    documents = list(read_documents(config.Data(sources=f"jsonl:{tmp_path}/*.jsonl.gz")))
    assert any(isinstance(document, Broken) for document in documents)
    found = measure(documents, make_scorer(), tokenizer, answers, stride=4, limit=2)
    assert found["a"].documents == 2
    assert "x.jsonl.gz:6 is left out" in capsys.readouterr().out.replace("\n", "")


def test_record_has_the_whole_and_the_domains():
    one = DomainText(1, 2, 8, 4 * math.log(2), np.array([2, 4]))
    other = DomainText(2, 2, 8, 12 * math.log(2), np.array([4, 6]))
    record = to_record({"one": one, "other": other}, 64, 32)
    assert record["all"]["bits_per_byte"] == pytest.approx(1.0)
    assert record["all"]["experts_per_token_by_layer"] == [1.5, 2.5]
    assert record["domains"]["other"]["perplexity"] == pytest.approx(64.0)


@pytest.mark.parametrize("stride", [0, 65])
def test_stride_that_cannot_be_is_refused(stride):
    with pytest.raises(config.ConfigError, match=f"--stride={stride}"):
        check_stride(64, stride)
