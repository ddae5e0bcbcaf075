"""Statistics that operations want are gathered once, kept by digests, and of alike texts apart."""

import dataclasses
import types

import numpy as np
import pytest

from dynmoe_jax.calibration import Statistics
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.surgery.experts.text_clusters import text_clusters
from dynmoe_jax.surgery.measuring import statistics
from dynmoe_jax.surgery.operation import Wanted
from dynmoe_jax.surgery.request import Options, price_of
from tests.in_memory_surgery import settings

NAME = "unit_magnitude"


def text(rows=12, length=8, groups=3):
    """Batches of four rows; each row has tokens of one group, the last row none."""
    random, batches = np.random.default_rng(0), []
    of_row = np.append(random.permutation(np.arange(rows - 1) % groups), 0)
    for first in range(0, rows, 4):
        own = of_row[first : first + 4]
        tokens = 10 * own[:, None] + random.integers(0, 10, (len(own), length))
        batches.append({"tokens": tokens, "segment_ids": np.ones_like(tokens)})
    batches[-1]["segment_ids"][-1] = 0
    return batches


@pytest.fixture
def gathered(tmp_path, monkeypatch):
    """(gathers what is wanted, the calls that passed text through a model)."""
    calls, cfg = [], settings()

    def gather(run, batches, wanted, bound, known, layers):
        missing = known.missing(dict.fromkeys(layers, wanted))
        if not any(missing.values()):
            return known
        calls.append((run.config.model.moe.routed_scale, len(batches), missing))
        arrays = {(n, layer): np.full(3, len(calls)) for layer in layers for n in missing[layer]}
        return dataclasses.replace(known, tokens=1, arrays={**known.arrays, **arrays})

    monkeypatch.setattr(statistics, "gather", gather)

    @dataclasses.dataclass(frozen=True)
    class Run:
        config: object

        def read(self, path):
            assert path == ("embedding_VD",)
            return np.repeat(np.eye(3, 5), 10, axis=0)

    parent = types.SimpleNamespace(
        model=Run(cfg), config=cfg, digest="of the model", folder=tmp_path / "parent"
    )

    def run(wanted, batches):
        asked = types.SimpleNamespace(options=Options())
        to = tmp_path / "result"
        job = types.SimpleNamespace(wanted=wanted, asked=asked, parents=[parent], to=to)
        told = types.SimpleNamespace(training=lambda tokens, seed: {"": batches})
        return statistics.statistics_of(job, told)

    return run, calls


def test_a_second_operation_finds_them_and_gathers_only_what_is_missing(gathered):
    run, calls = gathered
    wanted = Wanted(frozenset({NAME}), layers=(0,))
    first = run(wanted, text())
    again = run(wanted, text())
    assert len(calls) == 1
    np.testing.assert_array_equal(first.array(NAME, 0), again.array(NAME, 0))
    assert again.record()["files"] == first.record()["files"]
    assert again.record()["by_expert"] == {}
    more = run(dataclasses.replace(wanted, layers=(0, 1)), text())
    assert calls[1][2] == {0: (), 1: (NAME,)}
    assert more.files == first.files


def test_other_text_and_other_settings_of_the_model_are_kept_apart(gathered):
    run, calls = gathered
    wanted = Wanted(frozenset({NAME}), layers=(0,))
    other = dataclasses.replace(settings().model.moe, routed_scale=2.0)
    scaled = dataclasses.replace(settings().model, moe=other)
    files = {
        run(wanted, text()).files[0],
        run(wanted, text(rows=8)).files[0],
        run(dataclasses.replace(wanted, model=scaled), text()).files[0],
    }
    assert len(files) == len(calls) == 3
    assert [scale for scale, *_ in calls] == [1.0, 1.0, 2.0]


def test_clusters_of_text_have_statistics_of_their_own(gathered):
    run, calls = gathered
    found = run(Wanted(frozenset({NAME}), (0,), clusters=3), text())
    assert found.array(NAME, 0).shape == (3, 3)
    assert len(calls) == len(set(found.files)) == 3
    assert run(Wanted(), text()).record() == {}


def test_tokens_that_experts_computed_are_in_the_record():
    counts = [np.array([3, 0]), np.array([4, 1])]
    clusters = [
        Statistics("model", "text", tokens=7, arrays={("routed_tokens", 2): own}) for own in counts
    ]
    found = statistics.Gathered(frozenset({NAME}), clusters, ["file"] * 2).record()
    assert found["by_expert"] == {"2": [7, 1]}
    assert found["tokens"] == [7, 7]


def test_alike_rows_are_together_and_clusters_of_one_size():
    table_VD = np.repeat(np.eye(3, 5), 10, axis=0)
    batches = text(rows=13)  # the last row is empty
    clusters = text_clusters(batches, table_VD, 3, seed=0)
    groups = []
    for cluster in clusters:
        rows = np.concatenate([batch["tokens"] for batch in cluster])
        assert len(rows) == 4
        assert len({batch["tokens"].shape for batch in cluster}) == 1
        groups.append(set((rows // 10).ravel().tolist()))
    assert sorted(groups, key=min) == [{0}, {1}, {2}]
    with pytest.raises(ConfigError, match="gives 12 rows of text, and 13 clusters"):
        text_clusters(batches, table_VD, 13, seed=0)


def test_more_memory_than_allowed_is_refused_before_anything_is_read():
    wanted = Wanted(frozenset({"coactivation"}))
    assert price_of(wanted, settings(), Options()).bytes > 0
    with pytest.raises(ConfigError, match=r"needs .* GB of memory"):
        price_of(wanted, settings(), Options(calibration_memory=1e-4))
