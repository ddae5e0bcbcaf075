import dataclasses
import json
import os
import shutil
import socket

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from dynmoe_jax import config
from dynmoe_jax.data import DataError, prepare
from dynmoe_jax.data.preparation import prepare as preparation
from dynmoe_jax.data.preparation.builder import slugs
from dynmoe_jax.data.preparation.prepare import Prepared
from dynmoe_jax.data.preparation.split import hold_out, keep_within
from dynmoe_jax.data.preparation.spool import Entry
from tests.data.made_text import write_jsonl

QUICK = hypothesis_settings(max_examples=50, deadline=None)
ENTRIES = st.lists(
    st.builds(
        Entry,
        hash=st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 3).map(lambda i: i << 60)),
        size=st.integers(1, 1000),
        index=st.integers(0, 10**6),
    ),
    min_size=1,
    max_size=30,
)


def texts(examples) -> list[str]:
    return [example["text"].decode() for example in examples]


@QUICK
@given(ENTRIES, st.floats(0.001, 0.5))
def test_every_domain_with_two_texts_has_both_sides_and_they_share_no_text(entries, fraction):
    sides = hold_out({"d": entries}, fraction)["d"]
    assert sorted(sides.train + sides.heldout) == sorted(entries)
    assert not {e.hash for e in sides.train} & {e.hash for e in sides.heldout}
    assert sides.train
    assert bool(sides.heldout) == (len({e.hash for e in entries}) >= 2)


@QUICK
@given(st.dictionaries(st.sampled_from("abc"), ENTRIES, min_size=2), st.floats(0.001, 0.5))
def test_a_text_in_several_domains_comes_to_one_side(domains, fraction):
    sides = hold_out(domains, fraction)
    train = {entry.hash for side in sides.values() for entry in side.train}
    heldout = {entry.hash for side in sides.values() for entry in side.heldout}
    assert not train & heldout
    assert all(side.train for side in sides.values())


@QUICK
@given(ENTRIES, st.integers(0, 5000), st.randoms())
def test_the_cap_keeps_the_same_documents_in_whatever_order_they_come(entries, cap, rng):
    kept = keep_within(entries, cap)
    assert sum(entry.size for entry in kept) <= cap
    rng.shuffle(entries)
    assert keep_within(entries, cap) == kept


def test_a_document_beyond_the_cap_does_not_shut_out_the_others():
    entries = [Entry(hash=0, size=1000, index=0), *(Entry(hash=i, size=1, index=i) for i in (1, 2))]
    assert keep_within(entries, 500) == entries[1:]


def test_split_names_of_odd_domains_do_not_collide():
    found = slugs(["C++", "c", "C#", "数学", "物理", "x" * 200, "train/heldout"])
    assert len(set(found.values())) == len(found)
    assert all(slug.replace("_", "").isalnum() and len(slug) < 64 for slug in found.values())


def test_all_documents_are_prepared_once_and_the_sides_share_no_text(corpus, prepared):
    for domain in prepared.domains:
        lines = (corpus / f"{domain}.jsonl").read_text().splitlines()
        expected = [json.loads(line)["text"] for line in lines]
        train = texts(prepared.open_train(domain))
        heldout = texts(prepared.open_heldout(domain))
        assert sorted(train + heldout) == sorted(expected)
        assert not set(train) & set(heldout)
        assert len(train) == prepared.train[domain].documents
        assert sum(len(t.encode()) for t in heldout) == prepared.heldout[domain].bytes
        assert len(heldout) >= 1


def test_the_true_name_of_a_domain_and_the_origin_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": f"t{i}", "domain": "Größe & C++"} for i in range(9)])
    prepared = prepare(config.Data(sources=f"jsonl:{path}"), tmp_path / "out")
    assert prepared.domains == ["Größe & C++"]
    example = prepared.open_heldout("Größe & C++")[0]
    assert example["domain"].decode() == "Größe & C++"
    line = int(example["text"].decode()[1:]) + 1
    assert example["origin"].decode() == f"{path}:{line}"


def test_a_single_document_is_trained_on_and_nothing_is_held_out(tmp_path):
    (tmp_path / "only.txt").write_text("The only text.")
    prepared = prepare(config.Data(sources=f"text:{tmp_path}/*.txt"), tmp_path / "out")
    assert texts(prepared.open_train("text")) == ["The only text."]
    assert len(prepared.open_heldout("text")) == 0


def test_a_preparation_is_reused_and_says_so(settings, prepared, capsys):
    again = prepare(settings, prepared.directory.parent)
    assert "Reusing" in capsys.readouterr().out
    assert again.directory == prepared.directory
    assert again.train == prepared.train


@pytest.mark.parametrize(
    "change", [{"heldout_fraction": 0.3}, {"max_megabytes": 0.001}, {"text_field": "body"}]
)
def test_changed_settings_are_prepared_anew(tmp_path, change):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": f"{i} " * 50, "body": f"body {i}"} for i in range(20)])
    before = config.Data(sources=f"jsonl:{path}")
    first = prepare(before, tmp_path / "out")
    second = prepare(dataclasses.replace(before, **change), tmp_path / "out")
    assert first.directory != second.directory
    sides = (first.open_train("a"), second.open_train("a"))
    assert sorted(texts(sides[0])) != sorted(texts(sides[1]))


def test_a_changed_file_is_prepared_anew_and_a_moved_one_is_not(tmp_path):
    path = tmp_path / "a.jsonl"
    data = config.Data(sources=f"jsonl:{path}")
    write_jsonl(path, [{"text": f"text {i}"} for i in range(5)])
    first = prepare(data, tmp_path / "out").fingerprint
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(path, tmp_path / "elsewhere")
    moved = config.Data(sources=f"jsonl:{tmp_path}/elsewhere/*")
    assert prepare(moved, tmp_path / "out").fingerprint == first
    write_jsonl(path, [{"text": f"test {i}"} for i in range(5)])  # of the same size
    assert prepare(data, tmp_path / "out").fingerprint != first


def test_settings_of_the_stream_do_not_ask_for_a_new_preparation(settings, prepared):
    other = dataclasses.replace(settings, seq_len=64, domain_weights="alpha=1", virtual_shards=2)
    assert prepare(other, prepared.directory.parent).directory == prepared.directory


def test_two_preparations_of_the_same_have_the_same_documents_in_the_same_order(
    settings, prepared, tmp_path
):
    other = prepare(settings, tmp_path)
    assert other.fingerprint == prepared.fingerprint
    for domain in prepared.domains:
        assert list(other.open_train(domain)) == list(prepared.open_train(domain))
        assert list(other.open_heldout(domain)) == list(prepared.open_heldout(domain))


def test_a_half_written_preparation_is_never_taken_for_a_complete_one(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(9)])
    data, out = config.Data(sources=f"jsonl:{tmp_path}/a.jsonl"), tmp_path / "out"

    def power_cut(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "write_dataset", power_cut)
        patch.setattr(preparation.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, out)
    assert len(list(out.iterdir())) == 1  # what the interrupted one left
    assert prepare(data, out).train["a"].documents >= 1
    assert len(list(out.iterdir())) == 1


def test_what_a_killed_process_left_is_removed_and_a_living_ones_is_not(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(9)])
    out = tmp_path / "out"
    dead = out / f"unfinished-{socket.gethostname()}-{2**22 + 1}"
    living = out / f"unfinished-{socket.gethostname()}-{os.getppid()}"
    dead.mkdir(parents=True)
    living.mkdir()
    prepare(config.Data(sources=f"jsonl:{tmp_path}/a.jsonl"), out)
    assert not dead.exists()
    assert living.exists()


def test_a_preparation_can_be_moved(prepared, tmp_path):
    moved = Prepared(shutil.copytree(prepared.directory, tmp_path / "moved"))
    for domain in prepared.domains:
        assert texts(moved.open_train(domain)) == texts(prepared.open_train(domain))


def test_a_cap_that_leaves_nothing_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 100)
    data = config.Data(sources=f"text:{tmp_path}/*.txt", max_megabytes=0.0001)
    with pytest.raises(DataError, match=r"at most 0.0001 MB"):
        prepare(data, tmp_path / "out")


def test_the_tokenizers_text_is_balanced_over_the_domains_and_never_held_out(prepared):
    sizes = {domain: amount.bytes for domain, amount in prepared.train.items()}
    budget = 2 * min(sizes.values()) * len(sizes)
    sampled = list(prepared.sample_texts(budget / 1e6))
    owner = {t: d for d in prepared.domains for t in texts(prepared.open_train(d))}
    given = dict.fromkeys(sizes, 0)
    for text in sampled:
        given[owner[text]] += len(text.encode())
    assert given["gamma"] == sizes["gamma"]  # the smallest is used up
    longest = max(len(text.encode()) for text in owner)
    assert abs(given["alpha"] - given["beta"]) <= longest
    assert budget <= sum(given.values()) <= budget + longest


def test_a_split_is_opened_once(prepared):
    """TFDS never lets go of what it opens, and every evaluation reads the held-out text."""
    assert prepared.open_heldout("alpha") is prepared.open_heldout("alpha")
    assert prepared.open_heldout("alpha") is not prepared.open_train("alpha")


def test_the_tokenizers_text_of_books_is_what_was_asked_for_and_of_every_domain(tmp_path):
    """Documents of 2 MB, of which the first alone would be more than all."""
    for name in ("alpha", "gamma"):
        books = (f"{number} {name} without an end " * 80_000 for number in range(2))
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": book} for book in books])
    made = prepare(config.Data(sources=f"jsonl:{tmp_path}/*.jsonl"), tmp_path / "out")
    sampled = list(made.sample_texts(1.0))
    assert 1e6 <= sum(map(len, sampled)) < 1.2e6
    given = {name: sum(len(text) for text in sampled if name in text) for name in made.domains}
    assert abs(given["alpha"] - given["gamma"]) < 2e5
