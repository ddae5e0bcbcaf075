"""Runs whose model grows: killed anywhere they end alike, and every checkpoint is its own model."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.interop.architectures.registry import architecture_for
from dynmoe_jax.model import decoder_structure, variable_shapes
from dynmoe_jax.model.flops import training_flops
from dynmoe_jax.model.parameters import count_parameters
from dynmoe_jax.planning.planner import Request, plan_run
from dynmoe_jax.runs.checkpoint import Checkpoints
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.load import OpenedRun, load_run
from dynmoe_jax.runs.summary import read_summary
from dynmoe_jax.training import growth, trainer
from dynmoe_jax.training.optimizer import make_schedule
from tests.small_run import interrupt_at

pytestmark = pytest.mark.slow

GROW = "2:width=24,moe.hidden_width=24;4:num_layers=4,num_heads=4"


@pytest.fixture(scope="module")
def asked(settings, change):
    cfg = change(settings, checkpoint__every_steps=1, checkpoint__keep=9, model__mask_steps=2)
    return change(cfg, train__grow=GROW, evaluation__report=False)


@pytest.fixture(scope="module")
def whole(asked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert trainer.train(asked, folder) == 0
    return folder


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stops", [(2,), (3, 4, 5)])
def test_a_run_stopped_where_it_grows_ends_bit_for_bit_alike(
    asked, whole, stops, saved_state, tmp_path, monkeypatch
):
    for step in stops:
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, step)
            assert trainer.train(asked, tmp_path) != 0
    assert trainer.train(asked, tmp_path) == 0
    wanted, found = saved_state(whole, 6), saved_state(tmp_path, 6)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert [line["loss"] for line in lines(tmp_path)] == [line["loss"] for line in lines(whole)]


def test_every_checkpoint_has_the_model_of_its_step(asked, whole, saved_state):
    sizes = {2: (16, 2, 2, 16), 3: (24, 2, 2, 24), 4: (24, 2, 2, 24), 5: (24, 4, 4, 24)}
    for step, wanted in sizes.items():
        model = config.model_at(asked, step)
        found = model.width, model.num_layers, model.num_heads, model.moe.hidden_width
        assert found == wanted
        state = saved_state(whole, step)
        (embedding,) = (x for name, x in state.items() if name.startswith("['params']['embed"))
        assert embedding.shape[1] == model.width
    loaded, decoder, _ = load_run(whole)
    assert loaded.model.num_layers == 4
    assert loaded.model.mask_steps == 0  # two updates after growth all masks are 1
    assert decoder.embedding_VD.shape[1] == 24
    with contextlib.closing(Checkpoints(whole, None)) as checkpoints:
        half = config.settings_at(checkpoints.config(5), 5)
    with pytest.raises(CheckpointError, match="has grown and whose masks"):
        architecture_for(half.model)


@pytest.mark.parametrize("step", [2, 4])
def test_new_weights_change_nothing_at_first(asked, whole, step):
    before, after = (config.settings_at(asked, at).model for at in (step, step + 1))
    with contextlib.closing(Checkpoints(whole, None)) as checkpoints:
        run = OpenedRun(whole, config.settings_at(asked, step), step, checkpoints)
        params = run.params(variable_shapes(before))
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    fresh = jax.tree.map(draw, variable_shapes(after))
    larger = growth._variables(growth.Growing(before, after), params, fresh)
    tokens_BL = random.integers(0, before.vocab_size, (2, 16))
    small, large = (
        np.asarray(nnx.merge(decoder_structure(model), variables)(tokens_BL).logits)
        for model, variables in ((before, params), (after, larger))
    )
    assert np.abs(large - small).max() <= 1e-5 * max(1.0, np.abs(small).max())


def test_controllers_of_copies_begin_as_those_of_their_layers(asked):
    growing = growth.Growing(*(config.settings_at(asked, at).model for at in (4, 5)))
    states = {"balance": {"coefficient_N": jnp.array([1.0, 2.0]), "all": jnp.array(3.0)}}
    found = growth._of_moe_layers(growing, states)["balance"]
    np.testing.assert_array_equal(found["coefficient_N"], [1, 1, 2, 2])
    assert found["all"] == 3


def test_masks_rise_with_the_updates(whole, saved_state):
    found = []
    for step in (2, 3, 4, 5, 6):
        state = saved_state(whole, step)
        (mask_D,) = (x for name, x in state.items() if name.startswith("['params']['norm']['mask"))
        (layers,) = (x for name, x in state.items() if name.endswith("['layer_mask']['value']"))
        found.append((mask_D[16:].tolist()[:1], layers.tolist()))
    assert found == [
        ([], [1, 1]), ([0.5], [1, 1]), ([1], [1, 1]), ([1], [1, 0.5, 1, 0.5]), ([1], [1, 1, 1, 1])
    ]  # fmt: skip


def test_figures_are_those_of_the_steps_model(asked, whole):
    last = config.settings_at(asked, 6)
    assert read_summary(whole).parameters == count_parameters(last.model)
    tokens, length = last.train.batch_size * last.data.seq_len, last.data.seq_len
    for line in lines(whole):
        model = config.model_at(asked, line["step"])
        assert len(line["experts_per_token_by_layer"]) == model.num_layers
        low, high = (training_flops(model, tokens, length, rows * tokens) for rows in (0.0, 1e3))
        assert low < line["model_flops_per_second"] * line["seconds_step"] < high
    rates = [line["learning_rate"] for line in lines(whole)]
    assert rates[2] == pytest.approx(rates[0], rel=0.5)
    assert rates[2] < rates[1]


def test_the_learning_rate_begins_again(asked):
    schedule = make_schedule(asked.optimizer, 100, (40, 70))
    parts = [make_schedule(asked.optimizer, steps) for steps in (100, 60, 30)]
    for step, part, own in [(39, 0, 39), (40, 1, 0), (69, 1, 29), (70, 2, 0), (99, 2, 29)]:
        assert float(schedule(step)) == pytest.approx(float(parts[part](own)))


@pytest.mark.parametrize(
    ("grow", "said"),
    [
        ("2:width=8", "does not fit at step 2: width=8 is less than 16"),
        ("6:width=24", "names step 6, and steps .* are 1 to 5"),
        ("0:width=24", "names step 0"),
        ("3:width=24;2:width=32", "names step 2 after step 3"),
        ("2:num_heads=3,num_kv_heads=2", "does not keep at least 2 query heads"),
        ("2:depth=3", "names 'depth', which cannot grow"),
        ("2:width", "NAME=SIZE"),
        ("width=24", "not written STEP:NAME=SIZE"),
        ("2:hidden_width=48", "of nothing that a layer of it has"),
    ],
)
def test_what_cannot_grow_is_refused_in_a_sentence(asked, change, grow, said):
    with pytest.raises(ConfigError, match=said):
        change(asked, train__grow=grow)


def test_growth_needs_masks_and_stays_what_it_was(asked, change, whole):
    with pytest.raises(ConfigError, match="which they rise, such as 100"):
        change(asked, model__mask_steps=0)
    other = change(asked, train__grow="2:width=24")
    with pytest.raises(ConfigError, match="differs from"):
        trainer.train(other, whole)


def test_the_planner_refuses(asked, change):
    with pytest.raises(ConfigError, match="the planner plans one model"):
        plan_run(Request(asked, "v5p-8"))
