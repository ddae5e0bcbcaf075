"""Which batch a step trains on once some are left out, by counting on fingers."""

import itertools

from dynmoe_jax.training.health.skips import (
    Skip,
    SkippingStream,
    batch_of_step,
    read_skips,
    skips_of,
    write_skips,
)


def skip(first, last):
    return Skip(first, last, spike_step=0, resumed_step=0)


def test_batches_of_steps_by_hand():
    # 1 2 (3 4) 5 6 (7) 8 9
    skips = [skip(7, 7), skip(3, 4)]
    assert [batch_of_step(step, skips) for step in range(7)] == [0, 1, 2, 5, 6, 8, 9]
    assert [batch_of_step(step, []) for step in range(3)] == [0, 1, 2]


def test_ranges_that_overlap_or_touch_count_once():
    # 1 (2 3 4 5 6) 7
    skips = [skip(4, 6), skip(2, 3), skip(3, 5)]
    assert [batch_of_step(step, skips) for step in (1, 2, 3)] == [1, 7, 8]


def test_stream_continues_at_any_step_with_the_same_batches():
    skips = [skip(3, 4), skip(7, 7)]
    whole = list(itertools.islice(SkippingStream(iter(range(1, 100)), skips, 0), 8))
    assert whole == [1, 2, 5, 6, 8, 9, 10, 11]
    for done in range(8):
        # The stream stands after the batch of step ``done``, as a checkpoint has it.
        stream = itertools.islice(range(1, 100), batch_of_step(done, skips), None)
        assert next(SkippingStream(stream, skips, done)) == whole[done]


def test_ranges_are_kept_and_a_new_run_forgets_them(tmp_path):
    assert skips_of(tmp_path, 5) == []
    skips = [Skip(3, 4, 3, 1), Skip(7, 9, 6, 5)]
    write_skips(tmp_path, skips)
    assert read_skips(tmp_path) == skips_of(tmp_path, 5) == skips
    assert skips_of(tmp_path, 0) == read_skips(tmp_path) == []
