"""A toy of each kind goes the whole way: training, report, checkpoint, resuming, generation."""

import dataclasses
import functools
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import command_line, config
from dynmoe_jax.command_line import EXIT_INTERRUPTED
from dynmoe_jax.fields import free_setting, model_setting, run_setting
from dynmoe_jax.inference import __main__ as writing
from dynmoe_jax.inference.sampling import Sampling
from dynmoe_jax.inference.writer import Writer
from dynmoe_jax.interop.export_model import export_model
from dynmoe_jax.registry import (
    CONTROLLERS,
    LOSSES,
    OBJECTIVES,
    REGULARIZERS,
    ROUTERS,
    TRANSFORMS,
)
from dynmoe_jax.routing import Parameter, TopK
from dynmoe_jax.routing.controllers import Controller
from dynmoe_jax.routing.controllers.controller import state_of
from dynmoe_jax.routing.losses import RoutingLoss
from dynmoe_jax.routing.losses.loss import controller_setting, over_tokens, weight_setting
from dynmoe_jax.routing.record import used_first
from dynmoe_jax.routing.regularizers import Regularizer
from dynmoe_jax.routing.transforms import Transform
from dynmoe_jax.runs.begun import check_compatible, saved_config
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.runs.summary import read_summary
from dynmoe_jax.training.objectives import language_model
from dynmoe_jax.training.trainer import BAD_INPUT, train
from tests.small_run import interrupt_at

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class ToyRouter(TopK):
    """Top-k of logits with a learned offset; counts the tokens that it has seen."""

    offset: float = model_setting(0.5, "first offset of the experts", low=0.0)

    def parameters(self, width, num_experts):
        """A matrix and an offset."""
        first = lambda key, shape: jnp.full(shape, self.offset)  # noqa: E731
        shift = Parameter((num_experts,), init=first, decay=False)
        return super().parameters(width, num_experts) | {"shift_E": shift}

    def initial_state(self, num_experts):
        """No tokens."""
        return {"seen": jnp.float32(0)}

    def __call__(self, params, given):
        """Routes T tokens."""
        shift_E = params["shift_E"] if params else 0
        return super().__call__(
            params, dataclasses.replace(given, logits_TE=given.logits_TE + shift_E)
        )

    def measure(self, params, given, routing):
        """Tokens."""
        return {"tokens": jnp.sum(given.valid_T, dtype=jnp.float32)}

    def next_state(self, params_N, state_N, seen_N):
        """All tokens until here; the offset is set back to 0 after every update."""
        seen_N = state_N["seen"] + seen_N["tokens"]
        return {"seen": seen_N}, {"shift_E": jnp.zeros_like(params_N["shift_E"])}


@dataclasses.dataclass(frozen=True)
class ToyLoss(RoutingLoss):
    """Mean of the first expert's probability."""

    weight: float = weight_setting(help="of the toy loss")
    controller: str = controller_setting()

    def sums(self, routing, given, params):
        """Probabilities."""
        return {"first": over_tokens(routing.probs_TE, given.valid_T)[0]}

    def value(self, sums, tokens):
        """The mean."""
        return sums["first"] / tokens


@dataclasses.dataclass(frozen=True)
class ToyController(Controller):
    """Doubles the coefficient after every update."""

    def initial(self, weight, layers):
        """The weight."""
        return state_of(now=weight)

    def coefficient(self, weight, state, step):
        """The state."""
        return state["now"]

    def update(self, state, counts):
        """Twice as much."""
        return state_of(now=2 * state["now"])


@dataclasses.dataclass(frozen=True)
class ToyTransform(Transform):
    """Leaves out one expert."""

    expert: int = model_setting(1, "expert that is left out", low=0)

    def __call__(self, routing, given):
        """Leaves it out."""
        kept_TK = routing.expert_TK != self.expert
        expert_TK = jnp.where(kept_TK, routing.expert_TK, routing.num_experts)
        return used_first(dataclasses.replace(routing, expert_TK=expert_TK))


@dataclasses.dataclass(frozen=True)
class ToyRegularizer(Regularizer):
    """Adds noise to the logits, larger in every second step."""

    size: float = free_setting(0.1, "of the noise", low=0.0)
    reads = frozenset({"noise", "step"})

    def __call__(self, given, scores):
        """Adds it."""
        noise_T1 = given.draws(lambda key: jax.random.normal(key, (1,)))
        even_1 = jax.random.normal(given.held_key(2), (1,)) * (1 + given.step % 2)
        scale_E = jnp.arange(given.num_experts)
        logits_TE = given.logits_TE + self.size * scale_E * (noise_T1 + even_1)
        return dataclasses.replace(given, logits_TE=logits_TE)


@dataclasses.dataclass(frozen=True)
class ToyObjective(language_model.LanguageModel):
    """A multiple of the cross entropy."""

    factor: float = run_setting(2.0, "of the cross entropy", above=0.0)

    def value(self, sums):
        """The multiple."""
        value, parts = super().value(sums)
        return self.factor * value, parts


TOYS = {
    ROUTERS: ("toy_router", ToyRouter),
    LOSSES: ("toy_loss", ToyLoss),
    CONTROLLERS: ("toy_controller", ToyController),
    TRANSFORMS: ("toy_transform", ToyTransform),
    REGULARIZERS: ("toy_regularizer", ToyRegularizer),
    OBJECTIVES: ("toy_objective", ToyObjective),
}


@pytest.fixture(scope="module")
def toys():
    with pytest.MonkeyPatch.context() as patch:
        for registry, (name, kind) in TOYS.items():
            patch.setitem(registry._kinds, name, kind)
        yield


@pytest.fixture(scope="module")
def cfg(toys, settings):
    """The small run with a toy of each kind; made anew, since groups have come."""
    model = config.to_dict(settings)["model"] | {
        "moe": config.MoE(
            num_experts=4,
            hidden_width=16,
            router="toy_router",
            toy_router={"k": 2, "offset": 0.25},
            transforms="toy_transform",
            regularizers="toy_regularizer,jitter,expert_dropout",
            expert_dropout={"rate": 0.25, "interval": 5},
        )
    }
    return dataclasses.replace(
        config.Config(),
        model=config.Model(**model),
        loss=config.Loss(toy_loss={"weight": 0.5, "controller": "toy_controller"}),
        train=config.Train(
            steps=3,
            batch_size=8,
            log_every_steps=1,
            objective="toy_objective",
            toy_objective={"factor": 3.0},
        ),
        **{
            name: getattr(settings, name)
            for name in ("data", "optimizer", "evaluation", "logging", "checkpoint")
        },
    )


@pytest.fixture(scope="module")
def run(cfg, tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    assert train(cfg, folder) == 0
    return folder


def _variables(folder):
    return dict(nnx.state(load_run(folder)[1]).flat_state())


def test_metrics_report_and_summary_know_them(run):
    lines = read_metrics(run)
    assert [line["toy_loss_coefficient"] for line in lines] == [0.5, 1.0, 2.0]
    for line in lines:
        assert line["rows_dropped"] > 0
        parts = 3 * line["lm_loss"] + line["toy_loss_coefficient"] * line["toy_loss_loss"]
        parts += 1e-2 * line["balance_loss"] + 1e-4 * line["entropy_loss"]
        np.testing.assert_allclose(line["loss"], parts, rtol=1e-4)
    assert read_summary(run).complete
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "config.model.moe.toy_router.offset" in page
    assert "toy_loss" in page


def test_states_and_revised_parameters_lie_in_the_checkpoint(run):
    variables = {path[-1]: np.asarray(v[...]) for path, v in _variables(run).items()}
    # Three steps of eight sequences of 32 tokens, some of them padding.
    assert np.all(variables["seen"] > 600)
    assert np.all(variables["seen"] <= 3 * 8 * 32)
    np.testing.assert_array_equal(variables["shift_E"], 0)


def test_generation(run):
    _, decoder, tokenizer = load_run(run)
    writer = Writer(decoder, tokenizer, Sampling(max_tokens=4, temperature=0.0))
    assert len(writer.write(["the "])[0][0].pieces) == 4


def test_export_is_refused_in_a_sentence(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.model\.moe\.") as refusal:
        export_model(run, tmp_path / "out")
    assert "\n" not in str(refusal.value)


def test_resuming_goes_on_as_if_it_had_not_stopped(cfg, run, tmp_path, monkeypatch):
    parted = tmp_path / "parted"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert train(cfg, parted) == EXIT_INTERRUPTED
    assert train(cfg, parted) == 0
    for path, value in _variables(run).items():
        np.testing.assert_array_equal(value[...], _variables(parted)[path][...], err_msg=str(path))
    last = [read_metrics(folder)[-1] for folder in (run, parted)]
    assert last[0]["loss"] == last[1]["loss"]
    assert last[1]["toy_loss_coefficient"] == 2.0


def test_a_run_without_its_kind_is_refused_in_a_sentence(run, monkeypatch):
    monkeypatch.delitem(ROUTERS._kinds, "toy_router")
    with pytest.raises(config.ConfigError, match=r"router='toy_router' must be one of .*--plugin"):
        load_run(run)


def test_a_run_with_a_loss_that_is_not_imported_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.delitem(LOSSES._kinds, "toy_loss")
    saved = saved_config(run)
    assert config.kept_groups(saved)["loss.toy_loss"]["weight"] == 0.5
    with pytest.raises(config.ConfigError, match=r"toy_loss\.weight=0\.5 .* --plugin=FILE"):
        check_compatible(saved, saved, tmp_path)


@pytest.fixture
def forgotten():
    """A call after which the router of the documentation is unknown; so it is in the end."""

    def forget():
        ROUTERS._kinds.pop("second_if_close", None)
        for name in [name for name in sys.modules if name.startswith("dynmoe_jax_plugin_")]:
            del sys.modules[name]

    yield forget
    forget()


def test_the_router_of_the_documentation_trains_and_writes_by_plugin(
    tmp_path, corpus, forgotten, monkeypatch, capsys
):
    page = (ROOT / "docs" / "routers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) <= 45
    (tmp_path / "second_if_close.py").write_text(code, encoding="utf-8")
    plugin, workdir = f"--plugin={tmp_path / 'second_if_close.py'}", f"--workdir={tmp_path / 'run'}"
    small = {
        "model.num_layers": 1, "model.width": 16, "model.num_heads": 2, "model.num_kv_heads": 2,
        "model.head_width": 8, "model.vocab_size": 300, "data.seq_len": 32, "train.steps": 3,
        "data.sources": f"text:{corpus}", "data.heldout_fraction": 0.2, "evaluation.max_batches": 1,
        "evaluation.sample_tokens": 2, "logging.tensorboard": False,
        "model.moe.router": "second_if_close", "model.moe.second_if_close.margin": 0.2,
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in small.items()]

    def command(program, *arguments):
        """Exit code of a command, as in a process of its own; what it said."""
        forgotten()
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        code = program()
        return code, capsys.readouterr().out

    training = functools.partial(command_line.run, train, "", BAD_INPUT)
    settings = f"--config={ROOT / 'configs' / 'quickstart.py'}"
    code, said = command(training, plugin, settings, workdir, *flags)
    assert code == 0, said
    assert read_summary(tmp_path / "run").complete
    inference = (workdir, "--prompt=the", "--max_tokens=3")
    code, said = command(writing.main, *inference)
    assert code == 2
    assert "--plugin" in said
    code, said = command(writing.main, *inference, plugin)
    assert code == 0, said
    assert "more written" in said
