"""The pass with layers outside computes what the decoder does, one group of layers at a time."""

import gc
import weakref

import jax
import numpy as np
import pytest

from dynmoe_jax.calibration import forward, heldout_by_domain, logit_statistics
from dynmoe_jax.runs.load import load_run, opened_run
from tests.close import assert_close

MODELS = {
    "dense": {"every_n_layers": 0},
    "every_layer": {},
    "every_second": {"num_layers": 4, "every_n_layers": 2},
    "unlike": {
        "num_layers": 4,
        "layers": "1:moe.num_experts=6,moe.hidden_width=20;2:feed_forward=dense;3:num_heads=2,"
        "head_width=8",
    },
    "reads_layer_before": {"router": "moe_plus_plus", "top_p": {}, "tie_embeddings": True},
}


@pytest.fixture(scope="module", params=MODELS)
def run(request, on_disk):
    return on_disk(**MODELS[request.param])


@pytest.fixture(scope="module")
def whole(run, batches):
    """(normed stream, logits, load of each MoE layer) of every batch, by the decoder."""

    @jax.jit
    def compute(tokens, segments, positions):
        x_BLD, routing = run.decoder.hidden(tokens, segments, positions)
        load_NE = () if routing is None else routing.by_layer.load_E
        return x_BLD, run.decoder.logits(x_BLD), load_NE

    names = ("tokens", "segment_ids", "positions")
    return [jax.device_get(compute(*(batch[name] for name in names))) for batch in batches]


def test_streamed_states_and_losses_are_those_of_the_decoder(run, whole, batches):
    hidden = forward(run, batches)
    for found, (x_BLD, _, _), batch in zip(hidden, whole, batches, strict=True):
        valid = batch["segment_ids"] > 0
        assert found.dtype == np.float32
        assert_close(found[valid], x_BLD[valid])
    log_p = [jax.nn.log_softmax(logits) for _, logits, _ in whole]
    nll = [
        -np.take_along_axis(np.asarray(p), b["targets"][..., None], -1)[..., 0][
            b["segment_ids"] > 0
        ]
        for p, b in zip(log_p, batches, strict=True)
    ]
    found = logit_statistics(run, hidden, batches)
    assert_close(found.nll_T, np.concatenate(nll))
    best = [p.argmax(-1)[b["segment_ids"] > 0] for p, b in zip(log_p, batches, strict=True)]
    np.testing.assert_array_equal(found.argmax_T, np.concatenate(best))


def test_sums_by_domain_are_those_of_its_own_batches(run, whole, batches):
    by_domain = {"books": batches[:1], "code": batches[1:]}
    bytes_V = np.arange(32, dtype=np.int32)
    found = heldout_by_domain(run, by_domain, bytes_V).domains
    parts = {"books": whole[:1], "code": whole[1:]}
    for name, own in by_domain.items():
        valid = [batch["segment_ids"] > 0 for batch in own]
        targets = np.concatenate([b["targets"][v] for b, v in zip(own, valid, strict=True)])
        assert found[name].tokens == len(targets)
        assert found[name].bytes == targets.sum()
        layers = run.config.model.moe_layers
        assert sorted(found[name].load) == list(layers)
        for place, layer in enumerate(layers):
            load_E = sum(part[2][place] for part in parts[name])
            np.testing.assert_array_equal(
                found[name].load[layer], load_E[: len(found[name].load[layer])]
            )
            assert found[name].experts_per_token[layer] == pytest.approx(
                load_E.sum() / len(targets)
            )


def test_two_models_are_compared_token_by_token(on_disk, batches, monkeypatch):
    # Parts of the vocabulary and of the tokens that don't divide them.
    monkeypatch.setattr("dynmoe_jax.calibration.logits.COLUMNS_AT_ONCE", 12)
    monkeypatch.setattr("dynmoe_jax.calibration.logits.TOKENS_AT_ONCE", 5)
    runs = [on_disk(every_n_layers=0), on_disk(seed=1, every_n_layers=0, tie_embeddings=True)]
    hidden = [forward(run, batches) for run in runs]
    found = logit_statistics(runs[0], hidden[0], batches, (runs[1], hidden[1]))
    valid = [batch["segment_ids"] > 0 for batch in batches]
    logits = [
        np.concatenate(
            [
                np.asarray(run.decoder.logits(x), np.float64)[v]
                for x, v in zip(xs, valid, strict=True)
            ]
        )
        for run, xs in zip(runs, hidden, strict=True)
    ]
    log_p = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits]
    assert_close(found.kl_T, (np.exp(log_p[0]) * (log_p[0] - log_p[1])).sum(-1))
    assert found.largest == pytest.approx(np.abs(logits[0]).max())
    assert_close(found.difference_T, np.abs(logits[0] - logits[1]).max(-1))
    targets = np.concatenate([b["targets"][v] for b, v in zip(batches, valid, strict=True)])
    rows = np.arange(len(targets))
    assert_close(found.nll_T, -log_p[0][rows, targets])
    assert_close(found.other_nll_T, -log_p[1][rows, targets])
    np.testing.assert_array_equal(found.agrees_T, logits[0].argmax(-1) == logits[1].argmax(-1))
    same = logit_statistics(runs[0], hidden[0], batches, (runs[0], hidden[0]))
    assert not same.difference_T.any()
    assert not same.kl_T.any()


def test_taps_of_every_layer_and_batch_arrive_on_the_host(on_disk, batches):
    run, found = on_disk(num_layers=4, every_n_layers=2), {}
    forward(
        run,
        batches,
        lambda output: output.moe and output.moe.kept_T,
        lambda *place_and_value: found.update({place_and_value[:2]: place_and_value[2]}),
    )
    assert sorted(found) == [(layer, batch) for layer in (0, 2) for batch in range(3)]
    assert all(type(value) is np.ndarray for value in found.values())


def test_parameters_of_one_group_at_most_are_alive(on_disk, batches, monkeypatch):
    run, read = on_disk(num_layers=4, every_n_layers=2), []
    from_disk, down_EFD = run.read, (4, 12, 16)
    before = count_of_shape(down_EFD)

    def watched(path, index=()):
        values, group = from_disk(path, index), (path[0], *index)
        if alive(read) - {group}:
            gc.collect()  # JAX gives up memory that it shares with numpy at its next call, or here
        assert alive(read) <= {group}, f"{group} is read"
        if path[-1] == "down_EFD":
            assert count_of_shape(down_EFD) == before
        read.append((group, weakref.ref(values)))
        return values

    monkeypatch.setattr(run, "read", watched)
    logit_statistics(run, forward(run, batches), batches)
    assert {("groups", 0), ("groups", 1), ("embedding_VD",)} <= {group for group, _ in read}


def alive(read):
    """Groups of which an array is alive."""
    return {group for group, array in read if array() is not None}


def count_of_shape(shape):
    """Arrays of that shape that are alive on devices."""
    return sum(array.shape == shape for array in jax.live_arrays())


def test_a_run_on_disk_gives_the_states_of_the_loaded_decoder(workdir, batches):
    _, decoder, _ = load_run(workdir)
    with opened_run(workdir) as run:
        hidden = forward(run, batches[:1])
        nll_T = logit_statistics(run, hidden, batches[:1]).nll_T
    batch = batches[0]
    valid = batch["segment_ids"] > 0
    output = decoder(batch["tokens"], batch["segment_ids"], batch["positions"])
    log_p = np.asarray(jax.nn.log_softmax(output.logits))
    wanted = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    assert_close(nll_T, wanted[valid])
