"""Scores of responses, against a plain forward pass."""

import json
import math

import jax
import numpy as np
import pytest

from dynmoe_jax.data import DataError
from dynmoe_jax.data.chat.conversation import marked, write_spans
from dynmoe_jax.data.sources.document import Broken, Document
from dynmoe_jax.evaluation import __main__ as command
from dynmoe_jax.evaluation.harness.answers import AnswerFile
from dynmoe_jax.evaluation.responses import FILE_NAME, TaskScore, measure, to_record

TURNS = (
    [("user", "What is the color of snow?"), ("assistant", "white")],
    [("user", "Hi"), ("assistant", "Yes?"), ("user", "Ünother, 数"), ("assistant", "It is 数.")],
)


def conversation(turns, task="t"):
    text, spans = marked(turns)
    return Document(text, task, "x", write_spans(spans))


@pytest.fixture(scope="module")
def logits(decoder):
    """tokens -> log-probabilities behind each of them."""
    run = jax.jit(lambda tokens: jax.nn.log_softmax(decoder(tokens[None]).logits[0]))

    def plainly(tokens):
        return np.asarray(run(np.pad(np.array(tokens), (0, -len(tokens) % 64))))

    return plainly


def test_the_last_response_is_scored_with_what_ends_it(logits, tokenizer, make_scorer, tmp_path):
    documents = [conversation(turns, f"task {i}") for i, turns in enumerate(TURNS)]
    answers = AnswerFile(tmp_path / "answers.jsonl", "model")
    found = measure(documents, make_scorer(512), tokenizer, answers)
    for i, turns in enumerate(TURNS):
        said, ids = turns[-1][1], tokenizer.encode(documents[i].text)
        prompt = documents[i].text.removesuffix(said)
        # The first token that ends behind the prompt, by the bytes of all up to it.
        ends = np.cumsum(tokenizer.token_bytes_V[ids])
        first = int(np.searchsorted(ends, len(prompt.encode()), side="right"))
        tokens = [tokenizer.bos_id, *ids, tokenizer.eos_id]
        log_probs = logits(tokens)
        nll = -sum(log_probs[n, tokens[n + 1]] for n in range(first, len(ids) + 1))
        score = found[f"task {i}"]
        assert (score.responses, score.bytes) == (1, len(said.encode()))
        np.testing.assert_allclose(score.nll, nll, rtol=1e-5)
        np.testing.assert_allclose(score.bits_per_byte, nll / math.log(2) / len(said.encode()))


def test_an_exact_response_is_the_greedy_one(logits, tokenizer, make_scorer, tmp_path):
    """A model that draws at random never says what is asked for; what it does say is matched."""
    answers = AnswerFile(tmp_path / "answers.jsonl", "model")
    document = greedy_conversation(logits, tokenizer)
    assert measure([document], make_scorer(512), tokenizer, answers)["t"].exact == 1
    other = conversation(TURNS[0])
    assert measure([other], make_scorer(512), tokenizer, answers)["t"].exact == 0


def greedy_conversation(logits, tokenizer):
    """A conversation whose response is the token that the model finds most probable.

    Not every token is what the tokenizer makes of its text, behind every prompt.
    """
    for number in range(100):
        text, _ = marked([("user", f"Say {number}"), ("assistant", "")])
        prompt = tokenizer.encode(text).tolist()
        token = int(logits([tokenizer.bos_id, *prompt])[len(prompt)].argmax())
        said = text + tokenizer.decode([*prompt, token])[len(tokenizer.decode(prompt)) :]
        if said != text and tokenizer.encode(said + "\n").tolist()[: len(prompt) + 1] == [
            *prompt,
            token,
        ]:
            # The line behind it is no response, so EOS is not asked for.
            return Document(said + "\n", "t", "x", f"{len(text)}:{len(said)}")
    raise AssertionError("no prompt has such a response")


def test_what_is_no_conversation_is_left_out(tokenizer, make_scorer, tmp_path, capsys):
    answers = AnswerFile(tmp_path / "answers.jsonl", "model")
    documents = [Broken("x:1", "?"), Document("plain", "t", "x"), *map(conversation, TURNS)]
    found = measure(documents, make_scorer(512), tokenizer, answers, limit=1)
    assert found["t"].responses == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "2 records are no conversation" in said
    assert "x:1 is left out: ?." in said
    assert "x is left out: it has no response." in said
    with pytest.raises(DataError, match="--instructions names no conversation"):
        to_record({})


def test_the_command_writes_scores_by_task(workdir, tmp_path):
    asked = [f"--workdir={workdir}", "--instructions=tasks:target_unseen", f"--output={tmp_path}"]
    assert command.evaluate(command.parsed([*asked, "--limit=2"])) == 0
    record = json.loads((tmp_path / FILE_NAME).read_text())
    assert set(record["tasks"]) == {"last", "sound"}
    assert record["all"]["responses"] == 4


def test_scores_add_up():
    whole = TaskScore(1, 1, 8, math.log(2)) + TaskScore(3, 0, 8, 31 * math.log(2))
    assert (whole.share_exact, whole.bits_per_byte) == (0.25, pytest.approx(2.0))
