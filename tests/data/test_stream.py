import dataclasses
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from dynmoe_jax.data import (
    DataError,
    TrainStream,
    heldout_batches,
    merge_states,
    shards_of_rows,
)
from dynmoe_jax.data.part import part_of

MIXED = "alpha=1,beta=2,gamma=1.5"
QUICK = hypothesis_settings(max_examples=6, deadline=None)


def rows_of(stream, batches):
    """The rows of the next batches, each as one array [4, L]."""
    taken = [next(stream) for _ in range(batches)]
    return [np.stack(row) for b in taken for row in zip(*(b[n] for n in sorted(b)), strict=True)]


def in_turn(rows, batch_size, shards=4):
    """Rows of batches, which are sorted by shard there, in the order of the stream."""
    rounds = batch_size // shards
    order = [shard * rounds + turn for turn in range(rounds) for shard in range(shards)]
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batch[i] for batch in batches for i in order]


def same(ones, others):
    assert len(ones) == len(others)
    return all(np.array_equal(a, b) for a, b in zip(ones, others, strict=True))


@pytest.fixture
def make(prepared, tokenizer, settings):
    streams = []

    def build(batch_size=6, seed=0, shard_ids=None, **changes):
        data = dataclasses.replace(settings, **changes)
        streams.append(TrainStream(prepared, tokenizer, data, batch_size, seed, shard_ids))
        return streams[-1]

    yield build
    for stream in streams:
        stream.close()


def test_a_batch_is_four_full_int32_arrays(make, settings):
    batch = next(make(batch_size=6))
    assert set(batch) == {"tokens", "targets", "segment_ids", "positions"}
    for array in batch.values():
        assert (array.shape, array.dtype) == ((6, settings.seq_len), np.int32)
    assert batch["segment_ids"].min() == 1
    assert batch["positions"].max() < settings.seq_len


@pytest.mark.parametrize("weights", ["", MIXED])
def test_row_n_does_not_depend_on_the_batch_size(make, weights):
    small = rows_of(make(batch_size=3, domain_weights=weights), 20)
    large = rows_of(make(batch_size=20, domain_weights=weights), 3)
    assert same(small, in_turn(large, 20))
    assert not same(small, large)


def test_the_seed_decides_the_order(make):
    first, again, other = (rows_of(make(seed=seed), 4) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


@QUICK
@given(stop=st.integers(0, 40), batch_size=st.integers(1, 9), weights=st.sampled_from(["", MIXED]))
def test_a_stream_goes_on_exactly_where_its_state_was_taken(
    prepared, tokenizer, settings, stop, batch_size, weights
):
    data = dataclasses.replace(settings, domain_weights=weights)
    with TrainStream(prepared, tokenizer, data, batch_size, 0) as stream:
        rows_of(stream, stop)
        # What JSON does to the state is what a checkpoint does to it.
        state = json.loads(json.dumps(stream.get_state()))
        after = rows_of(stream, 12)
    with TrainStream(prepared, tokenizer, data, batch_size, 0) as resumed:
        next(resumed)  # a stream that has already run ahead
        resumed.set_state(state)
        assert resumed.get_state() == state
        assert same(rows_of(resumed, 12), after)


def test_the_state_is_that_of_what_was_taken_not_of_what_was_prefetched(make):
    patient, hasty = make(), make()
    next(patient)
    next(hasty)
    before = hasty.get_state()
    for _ in range(100):
        threading.Event().wait(0.002)  # the thread runs ahead
    assert hasty.get_state() == before == patient.get_state()


def test_readers_of_some_shards_get_their_rows_of_the_same_stream(make):
    whole = np.stack(rows_of(make(batch_size=8), 6)).reshape(6, 8, 4, -1)
    for shard_ids in ([0, 2], [1, 3], [3]):
        part = rows_of(make(batch_size=8, shard_ids=shard_ids), 6)
        expected = whole[:, [n for n in range(8) if n // 2 in shard_ids]]
        assert same(part, list(expected.reshape(-1, *expected.shape[2:])))


@pytest.mark.parametrize("weights", ["", MIXED])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2), (4, 1)])
def test_other_number_of_processes_goes_on_with_exactly_the_same_batches(
    make, weights, before, after
):
    """Packed, shuffled in windows, mixed: each process holds its block of the same batches."""

    def readers(count):
        rows = np.split(np.arange(8), count)
        own = [shards_of_rows(part, 8, 4) for part in rows]
        return [make(batch_size=8, domain_weights=weights, shard_ids=shards) for shards in own]

    def blocks(streams, batches):
        """Batches put together of the processes' blocks, as a global array is of its devices'."""
        for _ in range(batches):
            parts = [next(stream) for stream in streams]
            yield {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    whole = make(batch_size=8, domain_weights=weights)
    expected = [next(whole) for _ in range(45)]
    first, second = readers(before), readers(after)
    seen = list(blocks(first, 21))
    state = json.loads(json.dumps(merge_states([stream.get_state() for stream in first])))
    for stream in second:
        stream.set_state(state)
    seen += blocks(second, 24)
    assert merge_states([stream.get_state() for stream in second]) == whole.get_state()
    for batch, wanted in zip(seen, expected, strict=True):
        for name, array in wanted.items():
            np.testing.assert_array_equal(batch[name], array)


def test_states_that_do_not_make_a_whole_are_refused(make):
    left = make(batch_size=8, shard_ids=[0, 1])
    other = make(batch_size=8, shard_ids=[2, 3], seed=1)
    for states in ([left], [left, left]):
        with pytest.raises(ValueError, match="not all of 4"):
            merge_states([stream.get_state() for stream in states])
    with pytest.raises(ValueError, match="not of one stream"):
        merge_states([left.get_state(), other.get_state()])
    later = make(batch_size=8, shard_ids=[1, 2, 3])
    next(later)
    with pytest.raises(ValueError, match="shard 1 at different positions"):
        merge_states([left.get_state(), later.get_state()])


def test_readers_of_the_same_shard_make_one_position(make):
    whole, left, right = make(8), make(8, shard_ids=[0, 1]), make(8, shard_ids=[1, 2, 3])
    for stream in (whole, left, right):
        next(stream)
    assert merge_states([left.get_state(), right.get_state()]) == whole.get_state()


@pytest.mark.parametrize(
    ("rows", "batch_size", "shards"),
    [
        ([0, 1, 2, 3], 8, [0, 1]),  # two rows of each shard
        ([4, 5], 8, [2]),
        ([3, 4], 8, [1, 2]),  # one of each
        ([0, 7], 8, [0, 3]),  # devices that are no neighbours
        ([2], 4, [2]),
        ([0, 1, 2], 6, [0, 1, 2, 3]),  # six rows are no multiple of four shards
    ],
)
def test_shards_follow_from_the_rows_that_devices_hold(rows, batch_size, shards):
    assert shards_of_rows(rows, batch_size, 4) == shards


def test_a_batch_that_readers_cannot_share_is_refused(make):
    with pytest.raises(DataError, match=r"config.train.batch_size=6 .*virtual_shards=4"):
        make(batch_size=6, shard_ids=[0])


@pytest.mark.parametrize("shard_ids", [[], [4], [-1, 0]])
def test_shards_that_do_not_exist_are_refused(make, shard_ids):
    with pytest.raises(ValueError, match=r"must be some of 0\.\.3"):
        make(batch_size=8, shard_ids=shard_ids)


def test_domain_shares_hold_in_tokens(prepared, tokenizer, settings):
    data = dataclasses.replace(settings, domain_weights=MIXED, seq_len=16)
    texts = {
        domain: "\0".join(e["text"].decode() for e in prepared.open_train(domain))
        for domain in prepared.domains
    }
    count = dict.fromkeys(texts, 0)
    with TrainStream(prepared, tokenizer, data, 40, 0) as stream:
        rows = [tokens for _ in range(15) for tokens in next(stream)["tokens"]]
    for tokens in rows:
        inside = tokenizer.decode(tokens[4:12])  # long enough to tell the domain, mostly
        owners = [d for d, text in texts.items() if inside.strip("�") in text]
        for domain in owners:
            count[domain] += 1 / len(owners)
    shares = {domain: number / sum(count.values()) for domain, number in count.items()}
    for domain, share in {"alpha": 1 / 4.5, "beta": 2 / 4.5, "gamma": 1.5 / 4.5}.items():
        assert abs(shares[domain] - share) < 0.04


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seq_len": 64}, "config.data.seq_len=32, which is now 64"),
        ({"virtual_shards": 2}, "config.data.virtual_shards=4"),
        ({"domain_weights": MIXED}, "config.data.domain_weights"),
        ({"seed": 1}, "config.seed=0"),
    ],
)
def test_a_position_of_another_stream_is_refused_by_the_settings_name(make, changes, named):
    with pytest.raises(DataError, match=named.replace("(", r"\(")):
        make(**changes).set_state(make().get_state())


def test_a_position_in_other_data_is_refused(make):
    state = make().get_state() | {"data": "0" * 64}
    with pytest.raises(DataError, match=r"other data \(config.data.sources"):
        make().set_state(state)


def test_closing_ends_the_thread_and_can_be_done_twice(make):
    before = threading.active_count()
    stream = make()
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        next(stream)


def test_dropping_the_stream_ends_the_thread(prepared, tokenizer, settings):
    before = threading.active_count()
    stream = TrainStream(prepared, tokenizer, settings, 4, 0)
    next(stream)
    del stream
    assert threading.active_count() == before


def test_a_script_that_forgets_to_close_exits_at_once_and_in_silence(prepared, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.model")
    script = f"""
from pathlib import Path
from dynmoe_jax import config
from dynmoe_jax.data import open_tokenizer, TrainStream
from dynmoe_jax.data.preparation.prepare import Prepared
tokenizer = open_tokenizer({str(tmp_path / "t.model")!r})
prepared = Prepared(Path({str(prepared.directory)!r}))
stream = TrainStream(prepared, tokenizer, config.Data(seq_len=16), 4, 0)
print(next(stream)["tokens"].shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "(4, 16)\n", "")


@pytest.mark.parametrize("domain", ["alpha", "beta", "gamma"])
def test_held_out_batches_cover_every_token_once(prepared, tokenizer, settings, domain):
    batches = list(heldout_batches(prepared, tokenizer, settings, domain, 3, 1000))
    targets = np.concatenate([b["targets"][b["segment_ids"] > 0] for b in batches])
    texts = [example["text"].decode() for example in prepared.open_heldout(domain)]
    expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert targets.tolist() == [token for ids in expected for token in ids]
    size = sum(len(text.encode()) for text in texts)
    assert tokenizer.token_bytes_V[targets].sum() == size
    for batch in batches:
        assert {array.shape for array in batch.values()} == {(3, settings.seq_len)}
        padding = batch["segment_ids"] == 0
        assert not batch["targets"][padding].any()


def test_held_out_batches_are_the_same_every_time_and_stop_where_told(
    prepared, tokenizer, settings
):
    one, two = (
        list(heldout_batches(prepared, tokenizer, settings, "alpha", 2, 3)) for _ in range(2)
    )
    assert len(one) == 3
    assert all(np.array_equal(a[n], b[n]) for a, b in zip(one, two, strict=True) for n in a)


def test_parts_hold_every_training_document_once(prepared):
    domains = {name: prepared.open_train(name) for name in ("alpha", "beta")}
    assert min(map(len, domains.values())) > 15
    for domain, documents in domains.items():
        parts = [part_of(documents, f"{number}/3", domain) for number in (1, 2, 3)]
        texts = sorted(document["text"] for part in parts for document in part)
        assert texts == sorted(documents[i]["text"] for i in range(len(documents)))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        # By chance: not every third one as they lie.
        assert [d["text"] for d in parts[0]][:5] != [documents[3 * i]["text"] for i in range(5)]


def test_a_stream_reads_its_part_alone(make, tokenizer):
    def documents(part):
        stream, found = make(part=part, shuffle_tokens=0), set()
        for _ in range(12):
            batch = next(stream)
            for tokens, positions in zip(batch["tokens"], batch["positions"], strict=True):
                begins = np.flatnonzero((positions == 0) & (tokens == tokenizer.bos_id))
                found |= {tuple(tokens[i : i + 8]) for i in begins if i + 8 <= len(tokens)}
        return found

    ones, twos = documents("1/2"), documents("2/2")
    assert min(len(ones), len(twos)) > 3
    assert not ones & twos


def test_a_part_goes_on_as_itself_alone(make):
    stream = make(part="1/2")
    rows_of(stream, 2)
    state = json.loads(json.dumps(stream.get_state()))
    later = rows_of(stream, 2)
    again = make(part="1/2")
    again.set_state(state)
    assert same(rows_of(again, 2), later)
    with pytest.raises(DataError, match="part='1/2', which is now '2/2'"):
        make(part="2/2").set_state(state)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/100000"])
def test_a_part_that_cannot_be_is_refused(make, part):
    with pytest.raises(DataError, match=r"config\.data\.part"):
        make(part=part)
