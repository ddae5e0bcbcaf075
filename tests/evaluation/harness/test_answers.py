"""Answers that outlive the process."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.evaluation.harness.answers import AnswerFile, fingerprint
from dynmoe_jax.evaluation.harness.ask import ask
from dynmoe_jax.evaluation.scoring import scoring
from dynmoe_jax.evaluation.scoring.requests import Request

REQUESTS = [Request((1, 2, 3, token), 2) for token in range(6)]


def nothing(index):
    del index


def test_answers_come_back_and_a_torn_line_is_asked_again(tmp_path):
    path = tmp_path / "a" / "answers.jsonl"
    first = AnswerFile(path, "model")
    keys = [first.key("score", i) for i in range(3)]
    first.put((key, {"log_prob": -float(i)}) for i, key in enumerate(keys))
    first.close()
    path.write_text(path.read_text()[:-9])
    second = AnswerFile(path, "model")
    assert [second.get(key) for key in keys] == [{"log_prob": 0.0}, {"log_prob": -1.0}, None]
    second.put([(keys[2], {"log_prob": -5.0})])
    second.close()
    assert AnswerFile(path, "model").get(keys[2]) == {"log_prob": -5.0}


def test_lines_of_anything_else_do_no_harm(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('[1]\n"text"\n{"log_prob": 1}\n\n{"key": "k", "log_prob": 2.0}\n')
    assert AnswerFile(path, "model").get("k") == {"log_prob": 2.0}


def test_another_model_has_other_answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    one, other = AnswerFile(path, "one"), AnswerFile(path, "other")
    assert one.key("score", (1, 2), 1) != other.key("score", (1, 2), 1)
    assert one.key("score", (1, 2), 1) != one.key("score", (1, 2), 2)
    assert one.key("score", (1, 2), 1) == AnswerFile(path, "one").key("score", (1, 2), 1)


def test_without_resume_the_file_is_begun_anew(tmp_path):
    path = tmp_path / "answers.jsonl"
    first = AnswerFile(path, "model")
    first.put([("k", {"log_prob": 1.0})])
    first.close()
    assert AnswerFile(path, "model", resume=False).get("k") is None


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(config.ConfigError, match="cannot be written"):
        AnswerFile(tmp_path / "file" / "answers.jsonl", "model")


def test_fingerprint_tells_models_apart(decoder, settings):
    name = fingerprint(decoder, "tokenizer")
    assert name == fingerprint(decoder, "tokenizer")
    assert name != fingerprint(decoder, "another")
    structure, params = nnx.split(decoder)
    leaves, tree = jax.tree.flatten(params)
    leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].add(1e-3)
    assert name != fingerprint(nnx.merge(structure, jax.tree.unflatten(tree, leaves)), "tokenizer")


def test_a_killed_evaluation_goes_on(tmp_path, make_scorer, monkeypatch):
    path = tmp_path / "answers.jsonl"
    whole = ask(make_scorer(), AnswerFile(tmp_path / "other.jsonl", "m"), REQUESTS, nothing)
    ask(make_scorer(), AnswerFile(path, "m"), REQUESTS[:4], nothing)
    asked = []
    answer = scoring.Scorer.answer
    monkeypatch.setattr(
        scoring.Scorer, "answer", lambda self, r: asked.extend(r) or answer(self, r)
    )
    told = []
    again = ask(make_scorer(), AnswerFile(path, "m"), REQUESTS, told.append)
    assert asked == REQUESTS[4:]
    assert sorted(told) == list(range(6))
    np.testing.assert_allclose([a.log_prob for a in again], [a.log_prob for a in whole], atol=1e-5)
    for one, other in zip(again, whole, strict=True):
        assert one.greedy == other.greedy
        np.testing.assert_array_equal(one.experts_N, other.experts_N)
        np.testing.assert_array_equal(one.experts_L, other.experts_L)


def test_the_same_request_is_computed_once_and_answered_twice(tmp_path, make_scorer):
    path = tmp_path / "answers.jsonl"
    twice = [REQUESTS[0], REQUESTS[1], REQUESTS[0]]
    answers = ask(make_scorer(), AnswerFile(path, "m"), twice, nothing)
    assert answers[0].log_prob == answers[2].log_prob != answers[1].log_prob
    assert len(path.read_text().splitlines()) == 2
    assert all(json.loads(line)["key"] for line in path.read_text().splitlines())
