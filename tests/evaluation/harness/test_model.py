"""What the harness asks, answered as a plain forward pass would."""

import itertools
import json
import math

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs the extra eval: pip install -e '.[eval]'")

from lm_eval.api.instance import Instance

from dynmoe_jax import config
from dynmoe_jax.evaluation.harness.answers import AnswerFile
from dynmoe_jax.evaluation.harness.model import HarnessModel
from dynmoe_jax.evaluation.scoring.requests import Request
from dynmoe_jax.evaluation.scoring.tree_writing import TreeWriter


@pytest.fixture
def model(make_scorer, writer, tokenizer, tmp_path):
    return HarnessModel(
        make_scorer(), writer, tokenizer, AnswerFile(tmp_path / "answers.jsonl", "m")
    )


def instance(kind, task, *args):
    return Instance(kind, {}, args, 0, (task, 0, 1))


def test_context_follows_bos_and_its_last_space_goes_to_the_continuation(model, tokenizer, plain):
    asked = [
        instance("loglikelihood", "t", "Question: why?\nAnswer:", " because of it"),
        instance("loglikelihood", "t", "Question: why? ", "because"),
        instance("loglikelihood", "t", "", "Without a context."),
    ]
    answers = model.loglikelihood(asked)
    encode = lambda text: tokenizer.encode(text).tolist()  # noqa: E731
    bos = tokenizer.bos_id
    pairs = [
        ("Question: why?\nAnswer:", "Question: why?\nAnswer: because of it"),
        ("Question: why?", "Question: why? because"),
        ("", "Without a context."),
    ]
    for (before, whole), answer in zip(pairs, answers, strict=True):
        scored = len(encode(whole)) - len(encode(before))
        wanted = plain(Request((bos, *encode(whole)), scored))
        np.testing.assert_allclose(answer[0], wanted[0], atol=2e-4)
        assert answer[1] == wanted[1]


def test_rolling_predicts_every_token_once(make_scorer, writer, tokenizer, tmp_path, plain):
    model = HarnessModel(make_scorer(16), writer, tokenizer, AnswerFile(tmp_path / "a.jsonl", "m"))
    text = "A text that is longer than the window of sixteen tokens, by a good deal."
    found = model.loglikelihood_rolling([instance("loglikelihood_rolling", "t", text)] * 2)
    tokens = [tokenizer.bos_id, *tokenizer.encode(text).tolist()]
    wanted, done = 0.0, 1
    while done < len(tokens):
        end = min(done + 16, len(tokens))
        part = tokens[max(0, end - 17) : end]
        wanted += plain(Request(tuple(part), end - done))[0]
        done = end
    assert len(tokens) > 18
    np.testing.assert_allclose(found, [wanted, wanted], atol=5e-4)


def test_experts_are_counted_by_task_as_if_each_request_stood_alone(model, tokenizer, plain):
    asked = [
        instance("loglikelihood", "one", "The same context", " with an ending"),
        instance("loglikelihood", "one", "The same context", " with another one"),
        instance("loglikelihood", "two", "Else", " where"),
    ]
    model.loglikelihood(asked)
    texts = {"one": [a.args[0] + a.args[1] for a in asked[:2]], "two": ["Else where"]}
    for task, whole in texts.items():
        requests = [
            Request((tokenizer.bos_id, *tokenizer.encode(text).tolist()), 1) for text in whole
        ]
        experts = [plain(request)[2] for request in requests]
        use = model.experts.tasks[task]
        assert use.tokens == sum(len(request.read) for request in requests)
        np.testing.assert_array_equal(use.experts_N, sum(e.sum(axis=1) for e in experts))
        np.testing.assert_array_equal(use.example.experts_L, experts[0].sum(axis=0))
        np.testing.assert_allclose(
            use.mean, np.mean([e.sum() for e in experts]) * len(experts) / use.tokens / 2
        )
    both = model.experts.together(["one", "two", "absent"])
    assert both.tokens == sum(use.tokens for use in model.experts.tasks.values())
    assert math.isnan(model.experts.together([]).mean)


def test_tokens_are_ranked_by_the_experts_they_use(model, tokenizer):
    model.experts.add("t", (5, 6, 5), np.array([4, 5]), np.array([4, 1, 4]))
    model.experts.add("t", (6,), np.array([1, 1]), np.array([2]))
    assert model.experts.by_token(1) == [(5, 2.0, 2), (6, 0.75, 2)]
    assert model.experts.by_token(3) == []


def test_nothing_is_left_out_where_a_token_reaches_over_the_border(model, items, tokenizer, plain):
    encode = lambda text: [tokenizer.bos_id, *tokenizer.encode(text).tolist()]  # noqa: E731
    lines = (items / "arc_easy.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["question"][:60] for line in lines]
    cuts = [(text, i) for text in texts for i in range(1, len(text))]
    over = [(text, i) for text, i in cuts if len(encode(text[:i])) > len(_shared(encode, text, i))]
    over = over[:20]
    assert len(over) == 20
    answers = model.loglikelihood(
        [instance("loglikelihood", "t", text[:i], text[i:]) for text, i in over]
    )
    for (text, i), answer in zip(over, answers, strict=True):
        scored = len(encode(text)) - len(_shared(encode, text, i))
        wanted = plain(Request(tuple(encode(text)), scored))
        np.testing.assert_allclose(answer[0], wanted[0], atol=2e-4)
        assert answer[1] == wanted[1]


def _shared(encode, text, border):
    pairs = zip(encode(text[:border]), encode(text), strict=False)
    return [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


def test_an_empty_continuation_is_certain_and_said(model):
    asked = [instance("loglikelihood", "t", "Context", ending) for ending in ("", " more")]
    answers = model.loglikelihood(asked)
    assert answers[0] == (0.0, True)
    assert answers[1][0] < 0
    (sentence,) = model.remarks.sentences()
    assert sentence.startswith("t: 1 of 2 requests have nothing to score")


def test_a_continuation_longer_than_the_window_is_scored_whole(
    make_scorer, writer, tokenizer, tmp_path, plain
):
    model = HarnessModel(make_scorer(16), writer, tokenizer, AnswerFile(tmp_path / "a.jsonl", "m"))
    text = " because a goal of more than sixteen tokens, by a good deal, is easily found."
    ((found, _),) = model.loglikelihood([instance("loglikelihood", "t", "Question: why?", text)])
    before = [tokenizer.bos_id, *tokenizer.encode("Question: why?").tolist()]
    tokens = [tokenizer.bos_id, *tokenizer.encode("Question: why?" + text).tolist()]
    assert tokens[: len(before)] == before
    assert len(tokens) - len(before) > 16
    wanted, done = 0.0, len(before)
    while done < len(tokens):
        end = min(done + 8, len(tokens))
        wanted += plain(Request(tuple(tokens[max(0, end - 17) : end]), end - done))[0]
        done = end
    np.testing.assert_allclose(found, wanted, atol=5e-4)
    assert "more to score than the 16 tokens" in model.remarks.sentences()[0]


def test_prompts_that_are_cut_are_counted(make_scorer, writer, tokenizer, tmp_path):
    model = HarnessModel(make_scorer(16), writer, tokenizer, AnswerFile(tmp_path / "a.jsonl", "m"))
    long = "A prompt that is longer than the window of sixteen tokens, by a good deal."
    asked = [instance("loglikelihood", "one", text, " end") for text in (long, "Short", long * 2)]
    model.loglikelihood(asked)
    settings = {"until": [], "max_gen_toks": 12}
    prompt = model._prompt(instance("generate_until", "two", long, settings))
    assert (len(prompt.tokens), prompt.limit) == (8, 8)
    most = 1 + len(tokenizer.encode(long * 2 + " end")) - 1
    longest = 1 + len(tokenizer.encode(long))
    cut = "requests lost their beginning: with its answer, the longest has"
    room = "tokens, and 16 are read at once (--window)."
    assert model.remarks.sentences() == [
        f"one: 2 of 3 {cut} {most} {room}",
        "two: the answers of 1 of 1 requests may have 8 tokens, not 12: half of what is read at "
        "once (--window) is left to the prompt.",
        f"two: 1 of 1 {cut} {longest + 8} {room}",
    ]
    assert model.remarks.record() == {
        "one": {"lost_beginning": 2},
        "two": {"shorter_answers": 1, "lost_beginning": 1},
    }


def test_an_answer_of_a_shorter_window_is_not_taken_for_that_of_a_longer_one(
    make_scorer, writer, tokenizer, tmp_path
):
    kept = AnswerFile(tmp_path / "a.jsonl", "m")
    asked = [instance("loglikelihood", "t", "A prompt that is longer than sixteen tokens", " end")]
    short, long = (
        HarnessModel(make_scorer(window), writer, tokenizer, kept).loglikelihood(asked)
        for window in (16, 64)
    )
    fresh = AnswerFile(tmp_path / "b.jsonl", "m")
    again = HarnessModel(make_scorer(64), writer, tokenizer, fresh).loglikelihood(asked)
    assert long == again != short


def test_lone_surrogates_and_empty_texts_end_no_evaluation(model):
    asked = [instance("loglikelihood", "t", "hi \ud83d", end) for end in (" a", " \udcff")]
    whole = [instance("loglikelihood", "w", "hi \ufffd", end) for end in (" a", " \ufffd")]
    assert model.loglikelihood(asked) == model.loglikelihood(whole)
    rolling = [
        instance("loglikelihood_rolling", "r", text) for text in ("", "a \ud83d", "a \ufffd")
    ]
    nothing, *both = model.loglikelihood_rolling(rolling)
    assert nothing == 0
    assert both[0] == both[1]
    settings = {"until": [], "max_gen_toks": 4}
    prompts = [instance("generate_until", "g", text, settings) for text in ("\ud83d", "\ufffd")]
    texts = model.generate_until(prompts)
    assert texts[0] == texts[1]
    model._begin_with_bos = False
    assert model.generate_until([instance("generate_until", "e", "", settings)])[0]
    assert model.loglikelihood([instance("loglikelihood", "e", " ", "a")])[0][0] < 0
    assert [sentence[:30] for sentence in model.remarks.sentences()] == [
        "t: 2 of 2 requests hold lone s",
        "r: 1 of 3 requests hold lone s",
        "g: 1 of 2 requests hold lone s",
    ]


def test_answers_are_written_up_to_the_string_that_ends_them(model, tokenizer, plain):
    asked = [
        instance("generate_until", "g", f"Q: {question}\nA:", {"until": [], "max_gen_toks": 12})
        for question in ("one?", "two?")
    ]
    whole = model.generate_until(asked)
    text = whole[0]
    assert len(text) > 3
    stop = text[2:4]
    settings = {"until": ["never seen", stop], "max_gen_toks": 12, "do_sample": False}
    cut = model.generate_until([instance("generate_until", "h", "Q: one?\nA:", settings)])
    assert cut == [text[: text.index(stop)]]
    prompt = [tokenizer.bos_id, *tokenizer.encode("Q: one?\nA:").tolist()]
    use = model.experts.tasks["g"].example
    assert list(use.tokens[: len(prompt)]) == prompt
    assert len(use.experts_L) == len(prompt) + 11
    np.testing.assert_array_equal(use.experts_L, plain(Request((*use.tokens, 0), 1))[2].sum(axis=0))


def test_sampled_answers_are_refused(model):
    settings = {"until": ["x"], "do_sample": True, "temperature": 0.7}
    with pytest.raises(config.ConfigError, match="task g draws its answers at random"):
        model.generate_until([instance("generate_until", "g", "Q", settings)])


class Marked:
    """A tokenizer some of whose tokens are special: decoding leaves them out."""

    def __init__(self, tokenizer, special_tokens, end_ids=()):
        self._tokenizer, self.special_tokens = tokenizer, special_tokens
        self.end_ids = (tokenizer.eos_id, *end_ids)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def decode(self, ids):
        return self._tokenizer.decode([n for n in ids if n not in self.special_tokens])


@pytest.fixture
def write(make_scorer, writer, decoder, tokenizer, tmp_path):
    """(until, special tokens, ends) -> the answer to one prompt."""

    def answer(until, special_tokens, end_ids=()):
        marked = Marked(tokenizer, special_tokens, end_ids)
        ours = TreeWriter(decoder, 512, tokenizer.vocab_size, tokenizer.eos_id, marked.end_ids)
        answers = AnswerFile(tmp_path / "answers.jsonl", "m")
        model = HarnessModel(make_scorer(), ours, marked, answers)
        settings = {"until": until, "max_gen_toks": 12}
        [text] = model.generate_until([instance("generate_until", "g", "Q: one?\nA:", settings)])
        answers.close()
        read = model.experts.tasks["g"].example.tokens
        prompt = 1 + len(tokenizer.encode("Q: one?\nA:"))
        return text, list(read[prompt:])

    return answer


def test_an_answer_ends_at_special_tokens_and_at_all_of_the_tokenizers_ends(write, tokenizer):
    _, ids = write([], {})  # the last token is not read
    candidates = (n for n in range(2, 11) if ids[n] not in ids[:n])
    place = next(n for n in candidates if tokenizer.decode(ids[n : n + 1]))
    special, before = {ids[place]: "<|im_end|>"}, tokenizer.decode(ids[:place])
    after = tokenizer.decode([*ids[:place], *ids[place + 1 : place + 2]])[len(before) :]
    assert write(["<|im_end|>"], special) == (before, ids[:place])
    assert write([f"<|im_end|>{after}"], special)[0] == before
    assert write([], special)[1] == ids
    # Nothing that was kept of an answer with other ends is taken for this one.
    assert write([], {}, [ids[place]]) == (before, ids[: place - 1])
