"""Statistics against plain numpy, one pass for all of them, and none for those that are kept."""

import dataclasses
import os

import numpy as np
import pytest
from flax import nnx

from dynmoe_jax.calibration import STATISTICS, Statistics, forward, gather, gathering, price, store
from dynmoe_jax.calibration.statistics.statistic import sizes_of
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.model.stacks import stacks_of
from tests.close import assert_close

BOUND = 1 << 30
D = 16
NEW = Statistics("model", "text", samples=6)
FORWARD = frozenset(STATISTICS) - {"gradient_importance"}


@pytest.fixture(scope="module")
def run(on_disk):
    """A dense layer, two with four experts, and one with six of another width."""
    layers = "0:feed_forward=dense;3:moe.num_experts=6,moe.hidden_width=20"
    return on_disk(num_layers=4, layers=layers)


@pytest.fixture(scope="module")
def found(run, batches):
    return gather(run, batches, FORWARD, BOUND, NEW)


@pytest.fixture(scope="module")
def seen(run, batches):
    """Of each layer: (parameters, normed inputs of all valid tokens, logits, chosen experts)."""
    parts = {}

    def fold(layer, number, values):
        valid = (batches[number]["segment_ids"] > 0).reshape(-1)
        picked = [None if v is None else v.reshape(valid.size, -1)[valid] for v in values]
        parts.setdefault(layer, []).append(picked)

    def taps(output):
        routing = output.routing
        routed = (routing.logits_TE, routing.chosen_TE) if routing else (None, None)
        return output.attended_BLD, *routed

    forward(run, batches, taps, fold)
    layers = {}
    for stack, group in zip(stacks_of(run.config.model), run.decoder.stacks, strict=True):
        for place in range(len(stack.run.period)):
            for repeat, layer in enumerate(stack.layers_at(place)):
                own = nnx.state(group.layers[place]).flat_state()
                layers[layer] = {
                    p[-1]: np.asarray(v[...][repeat], np.float64)
                    for p, v in own
                    if p[0] != "attention_norm"
                }
    merged = {}
    for layer, of_layer in parts.items():
        columns = list(zip(*of_layer, strict=True))
        x, logits, chosen = (
            None if column[0] is None else np.concatenate(column) for column in columns
        )
        x = x.astype(np.float64)
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * layers[layer]["scale"]
        merged[layer] = (layers[layer], normed, logits, chosen)
    return merged


def units(x, gate_up):
    gate, up = np.split(x @ gate_up, 2, -1)
    return gate, gate / (1 + np.exp(-gate)) * up


def by_feed_forward(params, normed, chosen):
    """(activations, hidden units, outputs) of the dense feed-forward, or of each expert's rows."""
    if chosen is None:
        gate, hidden = units(normed, params["gate_up_D2F"])
        return [(gate, hidden, hidden @ params["down_FD"])]
    rows = [normed[chosen[:, e]] for e in range(chosen.shape[1])]
    parts = [units(x, w) for x, w in zip(rows, params["gate_up_ED2F"], strict=True)]
    return [(a, h, h @ w) for (a, h), w in zip(parts, params["down_EFD"], strict=True)]


OF_ROWS = {
    "unit_frequency": lambda a, h, y: (a > 0).mean(0),
    "unit_magnitude": lambda a, h, y: np.abs(h).mean(0),
    "coactivation": lambda a, h, y: np.maximum(a, 0).T @ np.maximum(a, 0),
    "expert_output_norm": lambda a, h, y: np.linalg.norm(y, axis=-1).mean(),
}


@pytest.mark.parametrize("name", OF_ROWS)
def test_statistics_of_hidden_units_are_those_of_numpy(found, seen, name):
    layers = found.by_layer(name)
    assert layers.keys() == ({1, 2, 3} if name == "expert_output_norm" else {0, 1, 2, 3})
    for layer, array in layers.items():
        params, normed, _, chosen = seen[layer]
        parts = by_feed_forward(params, normed, chosen)
        assert all(len(a) for a, _, _ in parts)
        wanted = np.stack([OF_ROWS[name](*part) for part in parts])
        assert_close(array, wanted if chosen is not None else wanted[0])


def test_tokens_by_expert_and_samples_are_those_of_the_layers(found, seen):
    order = None
    for layer, (_, normed, logits, chosen) in seen.items():
        inputs = found["ffn_input_samples", layer]
        rows = [np.abs(normed - x).sum(-1).argmin() for x in inputs]
        assert_close(inputs, normed[rows])
        order = order or rows
        assert rows == order, "other tokens than in the first layer"
        assert len(set(rows)) == 6
        if chosen is None:
            continue
        np.testing.assert_array_equal(found["routed_tokens", layer], chosen.sum(0))
        np.testing.assert_array_equal(found["router_input", layer], inputs)
        assert_close(found["router_output", layer], logits[rows])


def test_samples_of_attention_give_what_it_adds_to_the_stream(run, batches, found):
    valid = np.concatenate([(batch["segment_ids"] > 0).reshape(-1) for batch in batches])
    table_VD = run.read(("embedding_VD",))
    parts = {-1: [(None, table_VD[batch["tokens"]]) for batch in batches]}

    def fold(layer, number, values):
        parts.setdefault(layer, []).append(values)

    def streams(layer, which):
        """The stream behind attention (0) or the whole layer (1), of all valid tokens."""
        return np.concatenate([part[which].reshape(-1, D) for part in parts[layer]])[valid]

    forward(run, batches, lambda output: (output.attended_BLD, output.x_BLD), fold)
    normed = _normed(run, 0, "feed_forward_norm", streams(0, 0))
    inputs = found["ffn_input_samples", 0]
    rows = np.abs(inputs[:, None] - normed).sum(-1).argmin(1)
    for layer in range(4):
        before, attended = streams(layer - 1, 1)[rows], streams(layer, 0)[rows]
        normed = _normed(run, layer, "attention_norm", before)
        assert_close(found["attention_input_samples", layer], normed)
        output_HWD = _array(run, layer, "attention", "output_HWD")
        mixed = found["attention_mixed_samples", layer]
        assert_close(np.einsum("shw,hwd->sd", mixed, output_HWD), attended - before)


def _array(run, layer, *names):
    """A parameter of a layer."""
    for stack, group in zip(stacks_of(run.config.model), run.decoder.stacks, strict=True):
        for place in range(len(stack.run.period)):
            if layer in (layers := list(stack.layers_at(place))):
                state = dict(nnx.state(group.layers[place]).flat_state())
                return np.asarray(state[names][...][layers.index(layer)], np.float64)
    raise AssertionError(layer)


def _normed(run, layer, norm, x):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * _array(run, layer, norm, "scale")


def test_shapes_and_types_are_those_that_were_priced(run, found):
    for (name, layer), array in found.arrays.items():
        settings = run.config.model.by_layer[layer]
        assert array.shape == STATISTICS[name]().shape(settings, 6)
        assert array.dtype == (np.int64 if name == "routed_tokens" else np.float32)
    assert sizes_of(run.config.model.by_layer[3], 6)["E"] == 6


def test_one_pass_gathers_all_and_none_what_is_kept(on_disk, batches, tmp_path, monkeypatch):
    run, passes = on_disk(every_n_layers=0), []
    streamed = gathering.streamed
    counted = lambda *arguments: passes.append(1) or streamed(*arguments)  # noqa: E731
    monkeypatch.setattr(gathering, "streamed", counted)
    path = tmp_path / "statistics.safetensors"
    first = gather(run, batches, {"unit_frequency", "unit_magnitude"}, BOUND, NEW)
    assert len(passes) == 1
    first.save(path)
    reads = run.reads
    kept = Statistics.opened(path, NEW)
    again = gather(run, batches, {"unit_magnitude"}, BOUND, kept)
    assert (len(passes), run.reads) == (1, reads)
    np.testing.assert_array_equal(again["unit_magnitude", 1], first["unit_magnitude", 1])
    more = gather(run, batches, {"unit_magnitude", "ffn_input_samples"}, BOUND, kept)
    assert len(passes) == 2
    assert {name for name, _ in more.arrays} == {
        "unit_frequency",
        "unit_magnitude",
        "ffn_input_samples",
    }


def test_what_is_added_later_is_what_would_have_been_gathered_at_once(run, batches, found):
    """Means of experts, too, which are divided by tokens that are known already."""
    known = gather(run, batches, {"routed_tokens"}, BOUND, NEW)
    later = gather(run, batches, {"unit_magnitude"}, BOUND, known, layers=[3])
    assert {at for at in later.arrays if at[0] == "unit_magnitude"} == {("unit_magnitude", 3)}
    assert_close(later["unit_magnitude", 3], found["unit_magnitude", 3])


def test_processes_that_save_the_same_statistics_write_files_of_their_own(tmp_path, monkeypatch):
    written = []
    save_file = store.save_file
    monkeypatch.setattr(
        store, "save_file", lambda a, to, metadata: written.append(to) or save_file(a, to, metadata)
    )
    for process in (11, 12):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        arrays = {("unit_frequency", 0): np.ones(3, np.float32)}
        dataclasses.replace(NEW, arrays=arrays).save(tmp_path / "statistics.safetensors")
    assert len(set(written)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.safetensors"]


def test_a_file_of_another_model_text_or_sample_is_not_mixed_in(tmp_path):
    path = tmp_path / "statistics.safetensors"
    arrays = {("unit_frequency", 0): np.ones(3, np.float32), ("ffn_input_samples", 0): np.eye(2)}
    dataclasses.replace(NEW, tokens=9, arrays=arrays).save(path)
    assert Statistics.opened(path, NEW).tokens == 9
    other = Statistics.opened(path, dataclasses.replace(NEW, seed=1))
    assert list(other.arrays) == [("unit_frequency", 0)]
    with pytest.raises(ConfigError, match="another text"):
        Statistics.opened(path, dataclasses.replace(NEW, data="other"))
    with pytest.raises(ConfigError, match="another model"):
        Statistics.opened(path, dataclasses.replace(NEW, model="other"))
    path.write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match="no file of statistics"):
        Statistics.opened(path, NEW)


def test_refusals_come_before_anything_is_read(on_disk, batches):
    run = on_disk(every_n_layers=0)
    with pytest.raises(ConfigError, match="leave out coactivation"):
        gather(run, batches, {"coactivation"}, 10_000, NEW)
    with pytest.raises(ConfigError, match="take fewer tokens"):
        gather(run, batches, {"unit_frequency"}, 5_000, NEW)
    with pytest.raises(ConfigError, match="router_input, which holds in layers with experts"):
        gather(run, batches, {"router_input"}, BOUND, NEW)
    with pytest.raises(
        ConfigError, match="norms is no statistic; there are attention_input_samples"
    ):
        gather(run, batches, {"norms"}, BOUND, NEW)
    assert run.reads == 0


def test_price_grows_as_the_arithmetic_says(on_disk):
    model = on_disk(every_n_layers=0).config.model
    few, many = (price(model, {"unit_frequency"}, tokens) for tokens in (100, 1100))
    assert many.state_bytes - few.state_bytes == 4 * 1000 * model.width
    assert many.flops == pytest.approx(11 * few.flops)
    pairs = price(model, {"coactivation"}, 100)
    assert pairs.statistic_bytes["coactivation"] == 4 * 24**2 * 2 + 12 * 24**2
    both = price(model, {"unit_frequency", "coactivation"}, 100)
    assert both.bytes == few.bytes + pairs.statistic_bytes["coactivation"]
    back = price(model, {"gradient_importance"}, 100)
    assert back.flops > 4 * few.flops
