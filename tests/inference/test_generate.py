"""Writing with a cache against full forward passes, and batches against single prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax.inference.generate import Generator, rounded_up
from dynmoe_jax.inference.sampling import Sampling

PROMPTS = [np.array(ids, np.int32) for ids in ([0, 7, 3], [0, 11, 9, 4, 6, 2, 30], [0])]
NEW = 9
VOCAB = 33


@pytest.fixture(scope="module")
def forward(decoder):
    structure, params = nnx.split(decoder)

    @jax.jit
    def compute(params, tokens_L):
        segment_ids_1L = (tokens_L >= 0)[None].astype(jnp.int32)
        output = nnx.merge(structure, params)(jnp.maximum(tokens_L, 0)[None], segment_ids_1L)
        return output.logits[0], output.routing.experts_per_token[:, 0]

    def padded(tokens):
        """Logits and experts of the last position; what follows it is hidden by causality."""
        tokens_L = np.full(20, -1, np.int32)
        tokens_L[: len(tokens)] = tokens
        logits_LV, experts_NL = compute(params, tokens_L)
        return logits_LV[len(tokens) - 1], experts_NL[:, len(tokens) - 1]

    return padded


@pytest.fixture(scope="module")
def write(generator):
    def run(prompts, limits=NEW, stop_ids=(), samples=1, watch=None, vocab_size=VOCAB, **sampling):
        limits = [limits] * len(prompts) if isinstance(limits, int) else limits
        return generator.write(
            prompts,
            limits,
            Sampling(**{"temperature": 0.0} | sampling),
            vocab_size=vocab_size,
            stop_ids=list(stop_ids),
            samples=samples,
            watch=watch,
        )

    return run


def ids_of(written):
    return [continuation.ids.tolist() for continuation in written]


def test_greedy_text_and_experts_are_those_of_full_passes(write, forward):
    texts = write(PROMPTS)
    for prompt, written in zip(PROMPTS, texts, strict=True):
        tokens = prompt.tolist()
        for token, experts_N in zip(written.ids, written.experts_nN, strict=True):
            logits_V, wanted_N = forward(tokens)
            assert token == np.argmax(logits_V[:VOCAB])
            np.testing.assert_array_equal(experts_N, wanted_N)
            tokens.append(int(token))
        assert len(np.unique(written.experts_nN)) > 1
        assert not written.ended
    # A model that repeats itself would show nothing.
    assert len({token for ids in ids_of(texts) for token in ids}) > 3


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_each_prompt_gets_the_text_that_it_gets_alone(write, temperature):
    together = write(PROMPTS, temperature=temperature, samples=2)
    alone = [c for prompt in PROMPTS for c in write([prompt], temperature=temperature, samples=2)]
    assert ids_of(together) == ids_of(alone)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.experts_nN, other.experts_nN)
    if temperature:
        assert ids_of(together)[0] != ids_of(together)[1]


def test_seed_decides_the_draw_and_greedy_has_none(write):
    drawn = {seed: ids_of(write(PROMPTS, temperature=1.5, seed=seed)) for seed in (1, 2)}
    assert drawn[1] != drawn[2]
    assert drawn[1] == ids_of(write(PROMPTS, temperature=1.5, seed=1))
    assert ids_of(write(PROMPTS, seed=1)) == ids_of(write(PROMPTS, seed=2))


def test_rows_of_the_embedding_that_the_tokenizer_lacks_are_never_drawn(write):
    tokens = [
        t
        for seed in range(3)
        for ids in ids_of(write(PROMPTS, temperature=50.0, seed=seed, vocab_size=5))
        for t in ids
    ]
    assert set(tokens) == {0, 1, 2, 3, 4}


def test_a_stop_token_ends_its_sequence_alone_and_is_left_out(write):
    whole = write(PROMPTS)
    stop = int(whole[0].ids[4])
    ended = write(PROMPTS, stop_ids=[stop, 39])
    for before, after in zip(whole, ended, strict=True):
        stops = np.flatnonzero(before.ids == stop)
        end = stops[0] if stops.size else NEW
        assert after.ids.tolist() == before.ids[:end].tolist()
        np.testing.assert_array_equal(after.experts_nN, before.experts_nN[:end])
        assert after.ended == bool(stops.size)
    assert {continuation.ended for continuation in ended} == {True, False}


def test_limits_are_of_each_prompt(write):
    whole = ids_of(write(PROMPTS))
    assert ids_of(write(PROMPTS, limits=[1, 9, 4])) == [whole[0][:1], whole[1], whole[2][:4]]


def test_whoever_watches_sees_the_text_grow_and_may_end_it(write):
    seen = []

    def watch(written):
        seen.append([len(continuation.ids) for continuation in written])
        return [1] if len(written[1].ids) >= 5 else []

    whole, watched = write(PROMPTS), write(PROMPTS, watch=watch)
    assert seen == [[1, 1, 1], [5, 5, 5], [9, 5, 9]]
    assert ids_of(watched) == [
        whole[0].ids.tolist(),
        whole[1].ids[:5].tolist(),
        whole[2].ids.tolist(),
    ]
    assert [continuation.ended for continuation in watched] == [False, True, False]


def test_layers_in_a_scan_write_the_same(write, decoder):
    in_scan = Generator(decoder, copy_layers=False)
    written = in_scan.write(
        PROMPTS[:1], [NEW], Sampling(temperature=0.0), vocab_size=VOCAB, stop_ids=[]
    )
    assert ids_of(written) == ids_of(write(PROMPTS[:1]))


def test_speed_counts_what_was_read_and_written(write, generator):
    before = generator.speed.prompt_tokens, generator.speed.written_tokens
    write(PROMPTS)
    assert generator.speed.prompt_tokens - before[0] == 3 + 7 + 1
    # The first token of a sequence comes with its prompt.
    assert generator.speed.written_tokens - before[1] == 3 * (NEW - 1)


def test_sizes_are_rounded_up_so_that_few_are_compiled():
    assert [rounded_up(n, "cpu") for n in (1, 32, 33, 49, 65, 100, 129)] == [
        32, 32, 48, 64, 96, 128, 192,
    ]  # fmt: skip
    assert [rounded_up(n, "tpu") for n in (1, 128, 129, 300, 700)] == [128, 128, 256, 384, 768]


def test_parameters_over_a_mesh_write_the_same(write, decoder):
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("data",), automatic, devices=jax.devices()[:4])

    def spread(leaf):
        axes = ["data" if size % 4 == 0 else None for size in leaf.shape]
        first = axes.index("data") if "data" in axes else len(axes)
        spec = jax.sharding.PartitionSpec(*(axes[: first + 1]))
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    structure, params = nnx.split(decoder)
    over_mesh = Generator(nnx.merge(structure, jax.tree.map(spread, params)), copy_layers=False)
    written = over_mesh.write(
        PROMPTS[:1],
        [NEW],
        Sampling(temperature=0.0),
        vocab_size=VOCAB,
        stop_ids=[],
        watch=lambda written: [],
    )
    assert ids_of(written) == ids_of(write(PROMPTS[:1]))
