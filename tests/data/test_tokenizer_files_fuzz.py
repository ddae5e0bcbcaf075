"""Tokenizer folders with something changed: read as ``AutoTokenizer`` reads them, or refused."""

import collections
import contextlib

import pytest

from dynmoe_jax.data import DataError, open_tokenizer
from tests.data.tokenizer_mutations import mutated
from tests.data.tokenizers.as_transformers import differences, read_by_transformers
from tests.data.tokenizers.tokenizer_folders import PROBES, write

pytest.importorskip("transformers", minversion="5.24", reason="needs the extra test")


def outcome(seed, folder) -> str:
    """What came of a case; a failure says what is wrong."""
    write(folder, mutated(seed))
    try:
        ours = open_tokenizer(folder)
    except DataError as error:
        message = str(error)
        assert message.endswith(".")
        assert "\n" not in message
        return "refused"
    try:
        theirs = read_by_transformers(folder)
        wrong = differences(ours, theirs)
    # Whatever it is that transformers, or Rust below it, says.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | AssertionError):
            raise
        for text in PROBES:
            with contextlib.suppress(DataError):
                assert set(ours.encode(text).tolist()) <= set(range(ours.vocab_size))
        return "refused by transformers alone"
    assert not wrong
    return "read"


def test_changed_folders(fuzz_cases, tmp_path):
    outcomes, failures = collections.Counter(), []
    for seed in range(fuzz_cases(130, 1300)):
        try:
            outcomes[outcome(seed, tmp_path / str(seed))] += 1
        except Exception as error:
            failures.append(f"seed {seed}: {type(error).__name__}: {error}"[:500])
    assert not failures
    # Neither does it refuse everything, nor read what others do not.
    assert outcomes["read"] > outcomes.total() / 4
    assert outcomes["refused by transformers alone"] < outcomes.total() / 8
