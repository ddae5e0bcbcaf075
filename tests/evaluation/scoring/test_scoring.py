"""Shared contexts and packed rows against one plain forward pass for each request."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax.evaluation.scoring import scoring
from dynmoe_jax.evaluation.scoring.batches import lay_out, make_batches, row_count, row_length
from dynmoe_jax.evaluation.scoring.requests import Request
from dynmoe_jax.evaluation.scoring.scoring import Scorer
from dynmoe_jax.model import Decoder


def draw(rng, *lengths):
    return tuple(int(token) for token in rng.integers(0, 400, sum(lengths)))


@pytest.fixture(scope="module")
def requests():
    """Four endings of each of 12 contexts, of 1 to 9 tokens; some asked twice; texts alone."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(12):
        context = draw(rng, int(rng.integers(1, 60)))
        for _ in range(4):
            ending = draw(rng, int(rng.integers(1, 10)))
            found.append(Request((*context, *ending), len(ending)))
    context = draw(rng, 30)
    found += [Request((*context, token), 1) for token in range(20)]
    # Endings that begin alike, an ending that begins another one, and a longer context.
    found += [Request((*context, 4, 5, 6), 3), Request((*context, 4, 5), 2)]
    found += [Request((*context, 4, 5, 6), 1), Request((*context, 4, 5, 7, 8), 4)]
    found += [Request(draw(rng, 200, 1), 200), Request(draw(rng, 2), 1)]
    return [*found, *found[:7]]


@pytest.fixture(scope="module")
def plainly(requests, plain):
    return [plain(request) for request in requests]


def answers_of(scorer, requests):
    found = [pair for batch in scorer.answer(requests) for pair in batch]
    assert sorted(i for i, _ in found) == list(range(len(requests)))
    return [answer for _, answer in sorted(found, key=lambda pair: pair[0])]


@pytest.fixture(scope="module")
def scored(requests, decoder):
    scorer = Scorer(decoder, 512, 256)
    return scorer, answers_of(scorer, requests)


def test_log_probs_are_those_of_a_plain_forward(scored, plainly):
    actual = [answer.log_prob for answer in scored[1]]
    np.testing.assert_allclose(actual, [log_prob for log_prob, _, _ in plainly], atol=2e-4)


def test_greedy_is_whether_the_likeliest_tokens_follow(decoder, plain, make_scorer):
    rng = np.random.default_rng(3)
    context = draw(rng, 25)
    likeliest = max(range(400), key=lambda token: plain(Request((*context, token), 1))[0])
    asked = [Request((*context, token), 1) for token in (likeliest, (likeliest + 1) % 400)]
    asked.append(Request((*context, (likeliest + 1) % 400, 0), 2))
    assert [a.greedy for a in answers_of(make_scorer(), asked)] == [True, False, False]
    assert [plain(request)[1] for request in asked] == [True, False, False]


def test_experts_are_those_of_every_token_read_alone(scored, plainly, requests):
    counts = set()
    for request, answer, (_, _, experts_NL) in zip(requests, scored[1], plainly, strict=True):
        assert answer.experts_L.shape == (len(request.tokens) - 1,)
        np.testing.assert_array_equal(answer.experts_N, experts_NL.sum(axis=1))
        np.testing.assert_array_equal(answer.experts_L, experts_NL.sum(axis=0))
        counts |= set(answer.experts_L.tolist())
    assert len(counts) > 2  # or nothing would be shown


def test_only_the_last_tokens_count_where_it_is_said(plain, make_scorer):
    request = Request(draw(np.random.default_rng(1), 40), 3, counted=3)
    (answer,) = answers_of(make_scorer(), [request])
    experts_NL = plain(request)[2][:, -3:]
    np.testing.assert_array_equal(answer.experts_L, experts_NL.sum(axis=0))
    np.testing.assert_array_equal(answer.experts_N, experts_NL.sum(axis=1))


def test_contexts_are_read_once(scored, requests):
    scorer = scored[0]
    assert scorer.tokens_asked == sum(len(request.tokens) - 1 for request in requests)
    prefixes = {request.read[:n] for request in requests for n in range(1, len(request.tokens))}
    # The one long text has 200 tokens, and no prefix of a context is shared by chance.
    assert scorer.tokens_read == len(prefixes)


def test_twenty_answers_of_one_token_cost_no_tokens(decoder):
    scorer = Scorer(decoder, 512, 256)
    context = draw(np.random.default_rng(2), 30)
    answers_of(scorer, [Request((*context, token), 1) for token in range(20)])
    assert scorer.tokens_read == 30


def test_more_pairs_than_tokens_take_another_pass(decoder, plain):
    requests = [Request((7, token), 1) for token in range(400)]
    scorer = Scorer(decoder, 256, 256)
    answers = answers_of(scorer, requests)
    np.testing.assert_allclose(
        np.logaddexp.reduce([answer.log_prob for answer in answers]), 0.0, atol=1e-4
    )
    np.testing.assert_allclose(answers[333].log_prob, plain(requests[333])[0], atol=1e-4)


def test_long_requests_lose_their_beginning(plain, make_scorer):
    tokens = draw(np.random.default_rng(4), 90)
    (answer,) = answers_of(make_scorer(64), [Request(tokens, 5)])
    wanted, _, experts_NL = plain(Request(tokens[-65:], 5))
    np.testing.assert_allclose(answer.log_prob, wanted, atol=1e-4)
    np.testing.assert_array_equal(answer.experts_N, experts_NL.sum(axis=1))


def test_rows_of_one_length_have_one_shape():
    rng = np.random.default_rng(0)
    requests = [Request(draw(rng, int(rng.integers(20, 700))), 4) for _ in range(60)]
    shapes = set()
    for rows in make_batches(requests, 2048):
        for batch in lay_out(rows, requests, 2048):
            shapes.add(batch.tokens.shape)
            padding = batch.segment_ids == 0
            own = np.broadcast_to(np.arange(batch.ends.shape[1]), batch.ends.shape)
            np.testing.assert_array_equal(batch.ends[padding], own[padding] + 1)
    # The last batch of a length may have fewer rows.
    fewer = {(rows, 256) for rows in (1, 2, 3, 4, 6)} | {(3, 512), (2, 512), (1, 512), (1, 1024)}
    assert shapes <= {(8, 256), (4, 512), (2, 1024)} | fewer
    assert len(shapes) <= 4
    assert [row_length(size) for size in (1, 256, 257, 600, 1024)] == [256, 256, 512, 1024, 1024]


def test_rows_of_the_last_batch():
    wanted = [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert [row_count(rows) for rows in range(1, 14)] == wanted


def test_rows_are_full_but_for_a_few():
    rng = np.random.default_rng(0)
    requests = [Request(draw(rng, int(rng.integers(20, 200))), 4) for _ in range(400)]
    batches = make_batches(requests, 2048)
    used = sum(len(p.tree.tokens) for rows in batches for row in rows for p in row)
    given = sum(256 for rows in batches for _ in rows)
    assert used / given > 0.9


def test_few_programs_are_compiled(requests, decoder):
    before = scoring._score._cache_size()
    answers_of(Scorer(decoder, 512, 256), [request for request in requests if request.scored < 99])
    assert scoring._score._cache_size() <= before + 2


def test_dense_model_has_no_experts(settings):
    moe = dataclasses.replace(settings.model.moe, every_n_layers=0)
    model = dataclasses.replace(settings.model, hidden_width=8, moe=moe)
    structure, params = nnx.split(nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda x: np.full(x.shape, 0.1, np.float32), params)
    (answer,) = answers_of(Scorer(nnx.merge(structure, params), 256, 256), [Request((1, 2, 3), 2)])
    assert len(answer.experts_N) == 0
    # All parameters alike: every token is as likely as any other.
    np.testing.assert_allclose(answer.log_prob, -2 * np.log(400), atol=1e-4)
