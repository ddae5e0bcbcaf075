import itertools
from types import SimpleNamespace

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmoe_jax.data import DataError
from dynmoe_jax.data.packing import check_weights, pack, shard_rows

BOS, EOS = 1, 2
# Every character is one token: its code point.
CHARACTERS = SimpleNamespace(
    bos_id=BOS, eos_id=EOS, encode=lambda text: np.array([ord(c) for c in text], dtype=np.int32)
)


def rows_of(texts, seq_len):
    documents = grain.MapDataset.source([{"text": text.encode()} for text in texts])
    return list(pack(documents, CHARACTERS, seq_len))


def test_packing_worked_out_by_hand():
    # Documents 1de2, 1f2, 1ghij2; their inputs are 1de, 1f, 1ghij, their targets de2, f2, ghij2.
    d, e, f, g, h, i, j = map(ord, "defghij")
    first, second, third = rows_of(["de", "f", "ghij"], 4)
    assert first["tokens"].tolist() == [BOS, d, e, BOS]
    assert first["targets"].tolist() == [d, e, EOS, f]
    assert first["segment_ids"].tolist() == [1, 1, 1, 2]
    assert first["positions"].tolist() == [0, 1, 2, 0]
    # "f" was cut after its first pair; its last pair opens the next row as a segment of its own.
    assert second["tokens"].tolist() == [f, BOS, g, h]
    assert second["targets"].tolist() == [EOS, g, h, i]
    assert second["segment_ids"].tolist() == [1, 2, 2, 2]
    assert second["positions"].tolist() == [0, 0, 1, 2]
    assert third["tokens"].tolist() == [i, j, 0, 0]
    assert third["targets"].tolist() == [j, EOS, 0, 0]
    assert third["segment_ids"].tolist() == [1, 1, 0, 0]
    assert third["positions"].tolist() == [0, 1, 0, 0]


@settings(deadline=None)
@given(st.lists(st.text("abcdef", min_size=1, max_size=40), min_size=1), st.integers(2, 17))
def test_no_pair_is_lost_or_crosses_a_border(texts, seq_len):
    rows = rows_of(texts, seq_len)
    pairs = [
        (int(token), int(target))
        for row in rows
        for token, target, segment in zip(
            row["tokens"], row["targets"], row["segment_ids"], strict=True
        )
        if segment
    ]
    ids = [[BOS, *map(ord, text), EOS] for text in texts]
    assert pairs == [pair for one in ids for pair in itertools.pairwise(one)]
    for row in rows:
        assert {array.dtype for array in row.values()} == {np.dtype(np.int32)}
        assert {array.shape for array in row.values()} == {(seq_len,)}
        assert row["positions"].max() < seq_len
        starts = np.flatnonzero(row["positions"] == 0)
        assert set(row["segment_ids"][starts]) >= set(row["segment_ids"]) - {0}
    assert all(row["segment_ids"].min() > 0 for row in rows[:-1])


def shard_texts(documents, weights, shard, num_shards, epochs=1, seed=0):
    """The documents, by their one character, that a shard packs in its first epochs."""
    rows = shard_rows(documents, weights, CHARACTERS, 2, seed, shard, num_shards, 1)
    count = epochs * sum(-(-(len(d) - shard) // num_shards) for d in documents.values())
    iterator = iter(rows)  # inputs of a one-character document fill a row of two
    return [chr(next(iterator)["tokens"][1]) for _ in range(count)]


LETTERS = {"x": [{"text": c.encode()} for c in "abcdefghijklmnopqrstuvwx"]}


def test_shards_share_the_documents_out_and_reshuffle_every_epoch():
    epochs = {shard: shard_texts(LETTERS, {}, shard, 3, epochs=2) for shard in range(3)}
    first = [text for texts in epochs.values() for text in texts[:8]]
    assert sorted(first) == list("abcdefghijklmnopqrstuvwx")
    for texts in epochs.values():
        assert sorted(texts[:8]) == sorted(texts[8:])
        assert texts[:8] != texts[8:]
        assert texts[:8] != sorted(texts[:8])


def test_the_order_follows_the_seed():
    orders = [shard_texts(LETTERS, {}, 0, 1, seed=seed) for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_every_shard_has_an_order_of_its_own():
    twins = {"x": [{"text": c.encode()} for c in "abcdefghijkl" for _ in range(2)]}
    assert shard_texts(twins, {}, 0, 2) != shard_texts(twins, {}, 1, 2)


def test_neighbouring_seeds_do_not_shift_each_others_epochs():
    one = shard_texts(LETTERS, {}, 0, 1, epochs=2, seed=0)
    assert shard_texts(LETTERS, {}, 0, 1, seed=1) != one[24:]


@pytest.mark.parametrize("weights", [{}, {"x": 1.0}])
def test_fewer_documents_than_shards_still_fill_every_shard(weights):
    documents = {"x": [{"text": b"a"}, {"text": b"b"}]}
    seen = []
    for shard in range(5):
        rows = iter(shard_rows(documents, weights, CHARACTERS, 2, 0, shard, 5, 1))
        seen += [chr(next(rows)["tokens"][1]) for _ in range(3)]
    assert set(seen) == {"a", "b"}


def test_weights_hold_in_tokens_whatever_the_length_of_the_documents():
    documents = {
        "long": [{"text": b"l" * 500}] * 3,
        "short": [{"text": b"s"}] * 2000,
        "absent": [{"text": b"a"}] * 5,
    }
    weights = {"long": 1.0, "short": 3.0, "absent": 0.0}
    rows = iter(shard_rows(documents, weights, CHARACTERS, 16, 0, 2, 4, 1))
    tokens = np.concatenate([next(rows)["tokens"] for _ in range(400)])
    long = np.isin(tokens, [ord("l")]).sum()
    assert abs(long / tokens.size - 0.25) < 0.02
    assert not np.isin(tokens, [ord("a")]).any()


def test_one_row_from_each_shard_is_a_mixture_too():
    documents = {name: [{"text": name.encode() * 50}] * 8 for name in "ab"}
    weights = {"a": 1.0, "b": 1.0}
    first = [
        next(iter(shard_rows(documents, weights, CHARACTERS, 8, 0, v, 8, 1))) for v in range(8)
    ]
    letters = [chr(row["tokens"][2]) for row in first]
    assert letters.count("a") == letters.count("b") == 4


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"d": 2.0}])
def test_weights_must_name_every_domain_and_no_other(weights):
    with pytest.raises(DataError, match=r"config.data.domain_weights") as error:
        check_weights(weights, ["a", "b"])
    for wrong in {"a", "b"} ^ set(weights):
        assert wrong in str(error.value)
