"""Texts written behind shared prompts against one plain forward pass for each token."""

import jax
import numpy as np
import pytest

from dynmoe_jax.evaluation.scoring import tree_writing
from dynmoe_jax.evaluation.scoring.tree_writing import Prompt


def never(ids):
    del ids


@pytest.fixture(scope="module")
def plainly(decoder, tokenizer):
    """(prompt, tokens) -> (greedy tokens, experts [N, tokens read])."""
    run = jax.jit(lambda tokens: decoder(tokens[None]))

    def write(prompt, count):
        tokens = list(prompt)
        for _ in range(count):
            output = run(np.pad(np.array(tokens), (0, 192 - len(tokens))))
            logits_V = output.logits[0, len(tokens) - 1, : tokenizer.vocab_size]
            tokens.append(int(np.argmax(logits_V)))
        experts_NL = np.asarray(output.routing.experts_per_token)[:, 0, : len(tokens) - 1]
        return tokens[len(prompt) :], experts_NL

    return write


@pytest.fixture(scope="module")
def prompts():
    """Questions behind common examples, one of them twice, one that begins another; one alone."""
    rng = np.random.default_rng(7)
    draw = lambda length: tuple(int(x) for x in rng.integers(3, 400, length))  # noqa: E731
    examples = draw(90)
    found = [(*examples, *draw(int(rng.integers(4, 30)))) for _ in range(5)]
    return [*found, found[0], found[1][:-2], draw(3)]


def texts_of(writer, asked):
    found = dict(pair for batch in writer.write(asked) for pair in batch)
    assert sorted(found) == list(range(len(asked)))
    return [found[i] for i in range(len(asked))]


@pytest.fixture(params=["one round", "several rounds"])
def rounds(request, monkeypatch):
    if request.param == "several rounds":
        monkeypatch.setattr(tree_writing, "ROUNDS", (2, 3))
        monkeypatch.setattr(tree_writing, "CHUNK", 2)
    return request.param


def test_texts_and_experts_are_those_of_plain_forwards(writer, prompts, plainly, rounds):
    limits = [3, 9, 7, 1, 9, 3, 5, 8]
    asked = [Prompt(p, limit, never) for p, limit in zip(prompts, limits, strict=True)]
    before = writer.tokens_asked, writer.tokens_read
    for prompt, written in zip(asked, texts_of(writer, asked), strict=True):
        wanted, experts_NL = plainly(prompt.tokens, prompt.limit)
        assert 2 not in wanted  # EOS, which this model does not write
        assert written.ids == wanted
        np.testing.assert_array_equal(written.experts_L, experts_NL.sum(axis=0))
        np.testing.assert_array_equal(written.experts_N, experts_NL.sum(axis=1))
    read = writer.tokens_read - before[1]
    assert read < (writer.tokens_asked - before[0]) / 2
    if rounds == "one round":
        distinct = {p[:n] for p in prompts for n in range(1, len(p) + 1)}
        assert read == len(distinct)


def test_a_text_ends_where_it_is_said_to(writer, prompts, plainly, rounds):
    wanted, experts_NL = plainly(prompts[0], 9)
    stop = wanted[3]
    first = wanted.index(stop)

    def ended(ids):
        return ids.index(stop) + 1 if stop in ids else None

    texts = texts_of(writer, [Prompt(prompts[0], 9, ended), Prompt(prompts[1], 9, never)])
    assert texts[0].ids == wanted[: first + 1]
    assert texts[1].ids == plainly(prompts[1], 9)[0]
    read = len(prompts[0]) + first
    np.testing.assert_array_equal(texts[0].experts_L, experts_NL[:, :read].sum(axis=0))


def test_eos_ends_a_text_and_is_no_part_of_it(decoder, prompts, plainly, tokenizer):
    wanted, _ = plainly(prompts[2], 6)
    eos = wanted[2]
    writer = tree_writing.TreeWriter(decoder, 512, tokenizer.vocab_size, eos)
    (text,) = texts_of(writer, [Prompt(prompts[2], 6, never)])
    assert text.ids == wanted[: wanted.index(eos)]
    assert len(text.experts_L) == len(prompts[2]) + max(0, wanted.index(eos) - 1)


def test_nothing_to_write(writer):
    assert list(writer.write([])) == []
