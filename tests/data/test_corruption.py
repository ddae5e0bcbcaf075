"""UL2: spans rebuild the text, ratios and lengths hold, denoisers come in their proportions."""

import dataclasses
import json
from types import SimpleNamespace

import grain
import numpy as np
import pytest
from scipy import stats

from dynmoe_jax import config
from dynmoe_jax.data import (
    DataError,
    TrainStream,
    heldout_batches,
    merge_states,
    train_tokenizer,
)
from dynmoe_jax.data.corruption.rows import LATER, CorruptedRows
from dynmoe_jax.data.corruption.spans import Denoiser, masked
from dynmoe_jax.data.corruption.ul2 import UL2
from dynmoe_jax.registry import chosen

SENTINELS = 100
FIRST = 10_000
"""Id of the first sentinel of the stand-in below; text has smaller ones."""

TOKENIZER = SimpleNamespace(
    vocab_size=FIRST + SENTINELS,
    special_tokens={FIRST + n: f"<extra_id_{n}>" for n in range(SENTINELS)},
)


def restored(inputs, targets):
    """The text of inputs and targets: each sentinel in the former gives way to what stands behind
    it in the latter; without sentinels, one behind the other."""
    if not len(targets) or targets[0] < FIRST:
        return [*inputs, *targets]
    spans, found = {}, []
    for token in targets:
        if token >= FIRST:
            spans[int(token)] = current = []
        else:
            current.append(token)
    for token in inputs:
        found += spans.pop(int(token)) if token >= FIRST else [token]
    assert not spans
    return found


def examples_of(row):
    """(inputs, targets) of the segments of a row."""
    found = []
    for segment in range(1, row["segment_ids"].max() + 1):
        inside = row["segment_ids"] == segment
        ids = np.append(row["tokens"][inside], row["targets"][inside][-1])
        learned = row["learned"][inside]
        np.testing.assert_array_equal(row["tokens"][inside][1:], row["targets"][inside][:-1])
        np.testing.assert_array_equal(row["positions"][inside], np.arange(inside.sum()))
        first = len(ids) - learned.sum()
        assert learned[first - 1 :].all()
        assert not learned[: first - 1].any()
        assert ids[0] == 1  # BOS
        found.append((ids[1:first], ids[first:]))
    return found


@pytest.fixture(scope="module")
def drawn():
    """(length, denoiser, inputs, targets) of 10 000 pieces of 64 to 512 ids."""
    corrupt, draw, found = UL2().prepared(TOKENIZER), np.random.default_rng(0), []
    for number in range(10_000):
        ids = np.arange(draw.integers(1, 513))
        sample = corrupt(ids, 512, np.random.Generator(np.random.Philox(key=number)))
        found.append((ids[: sample.taken], sample.inputs, sample.targets))
    return found


def test_inputs_and_targets_rebuild_the_text_exactly_and_fit(drawn):
    for ids, inputs, targets in drawn:
        assert restored(inputs, targets) == ids.tolist()
        assert len(inputs) + len(targets) <= 512
        marks = inputs[inputs >= FIRST]
        assert marks.tolist() == targets[targets >= FIRST].tolist()  # each once, in order
        assert marks.tolist() == list(range(FIRST, FIRST + len(marks)))


@pytest.mark.parametrize(
    "denoiser", [Denoiser(*d) for d in [(3, 0.15), (8, 0.15), (3, 0.5), (8, 0.5), (64, 0.5)]]
)
def test_masked_share_and_span_length_hold_over_ten_thousand_pieces(denoiser):
    hidden = spans = 0
    length = 290
    draw, sentinels = np.random.default_rng(1), np.arange(FIRST, FIRST + SENTINELS)
    ids = np.arange(length)
    for _ in range(10_000):
        _, targets = masked(ids, denoiser, sentinels, tuple(draw.random(2)), draw)
        marks = int((targets >= FIRST).sum())
        spans, hidden = spans + marks, hidden + len(targets) - marks
    assert hidden / (10_000 * length) == pytest.approx(denoiser.density, rel=0.05)
    assert hidden / spans == pytest.approx(denoiser.span, rel=0.05)


def test_denoisers_come_in_their_proportions_by_chi_square(drawn):
    """Each example is told by what was done to it, not by what was drawn."""
    expected = UL2().shares
    assert list(expected.values()) == pytest.approx([0.5, *[0.1] * 5])
    spans = [denoiser.span for denoiser in expected if denoiser.span and denoiser.density == 0.5]
    counts = dict.fromkeys(expected, 0)
    for ids, _, targets in drawn:
        if len(ids) < 150:
            continue
        marks = int((targets >= FIRST).sum())
        hidden = len(targets) - marks
        mean = hidden / marks if marks else 0.0
        span = min(spans, key=lambda mu: abs(np.log(mean / mu))) if marks else 0.0
        counts[span, 0.5 if not marks or hidden > 0.3 * len(ids) else 0.15] += 1
    total = sum(counts.values())
    assert total > 6000
    shares = np.array(list(expected.values()))
    assert stats.chisquare(list(counts.values()), total * shares).pvalue > 1e-3


def test_every_place_is_masked_as_often_but_the_ends():
    """Spans are drawn anywhere; a piece begins with text and ends with a span."""
    ids, hits = np.arange(64), np.zeros(64)
    draw, sentinels = np.random.default_rng(2), np.arange(FIRST, FIRST + SENTINELS)
    for _ in range(2000):
        _, targets = masked(ids, Denoiser(3, 0.5), sentinels, tuple(draw.random(2)), draw)
        hits[targets[targets < FIRST]] += 1
    assert hits[0] == 0
    assert hits[-1] == 2000
    np.testing.assert_allclose(hits[8:-8] / 2000, 0.5, atol=0.08)


def rows_of(lengths, seq_len=40, count=30):
    documents = grain.MapDataset.source([np.arange(2, 2 + n) for n in lengths]).repeat()
    rows = CorruptedRows(documents, lambda ids: ids, UL2().prepared(TOKENIZER), 1, seq_len, 7)
    iterator = iter(rows)
    return [next(iterator) for _ in range(count)]


def test_packed_rows_rebuild_the_documents_in_order_and_never_cut_an_example():
    lengths = [5, 90, 1, 33, 260]
    text = [
        token for row in rows_of(lengths) for each in examples_of(row) for token in restored(*each)
    ]
    wanted = [token for _ in range(9) for n in lengths for token in range(2, 2 + n)]
    assert len(text) > 2 * sum(lengths)
    assert text == wanted[: len(text)]
    for row in rows_of(lengths):
        assert (row["segment_ids"] == 0).sum() < 8
        assert (row["learned"][row["segment_ids"] == 0] == 0).all()
        assert LATER in row


# ── In the stream ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def ul2(settings):
    changes = {"num_sentinels": 20, "until_step": 9}
    known = {name: getattr(settings, name) for name in ("sources", "heldout_fraction")}
    return config.Data(
        seq_len=32, virtual_shards=4, shuffle_tokens=384, corruption="ul2", ul2=changes, **known
    )


@pytest.fixture(scope="module")
def with_sentinels(prepared, ul2, tmp_path_factory):
    path = tmp_path_factory.mktemp("with_sentinels") / "t.model"
    return train_tokenizer(
        prepared.sample_texts(1.0), 384, path, chosen(ul2, "corruption").reserved
    )


def batches(stream, count):
    return [next(stream) for _ in range(count)]


def assert_same(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name])


def until(data, step):
    return dataclasses.replace(data, ul2=dataclasses.replace(data.ul2, until_step=step))


def corrupted(batch):
    return (batch["learned"] != (batch["segment_ids"] > 0)).any(axis=1)


WEIGHTS = ["alpha=1,beta=2,gamma=1.5", "proportional:cap=20"]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_switch_is_exact_and_resumes_before_and_behind_it_bit_for_bit(
    prepared, with_sentinels, ul2, weights
):
    data = dataclasses.replace(ul2, domain_weights=weights)
    with TrainStream(prepared, with_sentinels, data, 8, 0) as stream:
        expected, states = [], []
        for _ in range(16):
            states.append(json.loads(json.dumps(stream.get_state())))
            expected.append(next(stream))
    # An example of one id is all learned, which a whole row of them is not.
    assert [bool(corrupted(batch).all()) for batch in expected] == [True] * 9 + [False] * 7
    assert not any(corrupted(batch).any() for batch in expected[9:])
    for stop in (4, 9, 13):
        with TrainStream(prepared, with_sentinels, data, 8, 0) as resumed:
            next(resumed)
            resumed.set_state(states[stop])
            assert resumed.get_state() == states[stop]
            assert_same(batches(resumed, 16 - stop), expected[stop:])


def test_readers_of_some_shards_get_their_rows_and_others_go_on(prepared, with_sentinels, ul2):
    with TrainStream(prepared, with_sentinels, ul2, 8, 0) as whole:
        expected = batches(whole, 14)
    parts = [TrainStream(prepared, with_sentinels, ul2, 8, 0, ids) for ids in ([0, 1], [2, 3])]
    seen = [[next(part) for part in parts] for _ in range(8)]
    state = json.loads(json.dumps(merge_states([part.get_state() for part in parts])))
    for both, batch in zip(seen, expected, strict=False):
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in both]), array)
    with TrainStream(prepared, with_sentinels, ul2, 8, 0) as stream:
        stream.set_state(state)
        assert_same(batches(stream, 6), expected[8:])
    for part in parts:
        part.close()


def test_plain_text_goes_on_behind_the_documents_that_were_corrupted(prepared, with_sentinels, ul2):
    """The first plain rows hold no text of the corrupted ones, where nothing is shuffled."""
    data = dataclasses.replace(until(ul2, 2), shuffle_tokens=0, virtual_shards=1)
    with TrainStream(prepared, with_sentinels, data, 4, 0) as stream:
        before, after = batches(stream, 2), next(stream)
    seen = {tuple(b["tokens"][0][:4]) for b in before}
    assert not seen & {tuple(row[:4]) for row in after["tokens"]}
    assert after["tokens"][0][0] == with_sentinels.bos_id
    assert after["positions"][0][0] == 0


def test_the_switch_may_be_moved_while_it_is_to_come(prepared, with_sentinels, ul2):
    with TrainStream(prepared, with_sentinels, until(ul2, 0), 8, 0) as stream:
        batches(stream, 5)
        state = stream.get_state()
    with TrainStream(prepared, with_sentinels, until(ul2, 7), 8, 0) as stream:
        stream.set_state(state)
        kinds = [bool(corrupted(batch).any()) for batch in batches(stream, 4)]
        assert kinds == [True, True, False, False]
        later = stream.get_state()
    for step, taken in ((4, state), (8, later), (0, later)):
        with (
            TrainStream(prepared, with_sentinels, until(ul2, step), 8, 0) as stream,
            pytest.raises(DataError, match=rf"config.data.ul2.until_step={step} would change"),
        ):
            stream.set_state(taken)


def test_held_out_text_is_not_corrupted(prepared, with_sentinels, ul2):
    batch = next(iter(heldout_batches(prepared, with_sentinels, ul2, "alpha", 2, 1)))
    assert "learned" not in batch


def test_a_tokenizer_without_sentinels_is_refused_in_a_sentence(prepared, tokenizer, ul2):
    with pytest.raises(DataError, match=r"config.data.ul2.sentinel='<extra_id_\{\}>' names no"):
        TrainStream(prepared, tokenizer, ul2, 8, 0)


def test_reserved_tokens_are_no_text_and_take_nothing_from_it(with_sentinels):
    text = "alpha <extra_id_3> beta"
    ids = with_sentinels.encode(text)
    assert with_sentinels.decode(ids) == text
    assert not set(ids.tolist()) & with_sentinels.special_tokens.keys()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"denoisers": "3/0.5"}, "config.data.ul2.denoisers holds '3/0.5'; write each once"),
        ({"denoisers": "prefix/1.5=1"}, "holds 'prefix/1.5=1'"),
        ({"denoisers": "3/0.5=1,3/0.5=2"}, "write each once"),
        ({"denoisers": ""}, "config.data.ul2.denoisers='' names none"),
        ({"sentinel": "<mask>"}, "config.data.ul2.sentinel='<mask>' must have one {}"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_sentence(changes, named):
    with pytest.raises(config.ConfigError) as error:
        config.Config(data=config.Data(corruption="ul2", ul2=changes))
    assert named in str(error.value)


def test_what_looks_for_marks_in_the_text_is_refused():
    import dynmoe_jax.training.objectives  # noqa: F401

    with pytest.raises(config.ConfigError, match=r"config.train.objective='response_only'"):
        config.Config(
            data=config.Data(corruption="ul2"), train=config.Train(objective="response_only")
        )


def test_a_sentinel_may_have_other_braces():
    assert UL2(sentinel="{ {} {x}", num_sentinels=2).reserved == ("{ 0 {x}", "{ 1 {x}")
