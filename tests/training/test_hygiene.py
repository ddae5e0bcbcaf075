"""Long runs: nothing is compiled twice, and what was compiled is kept for the next start."""

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest
from jax._src import monitoring

from dynmoe_jax import config
from dynmoe_jax.runs import compilation
from dynmoe_jax.runs.compilation import compiled_programs_kept
from dynmoe_jax.training import trainer
from dynmoe_jax.training.trainer import train

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations():
    """Counts programs that are compiled, or taken from a cache, from here on."""
    found = []

    def listen(event, duration, **_):
        if event == COMPILED:
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_nothing_is_compiled_after_step_2(settings, change, tmp_path, monkeypatch, compilations):
    """Neither by steps, nor by evaluations and checkpoints after the first of them."""
    by_step = {}

    class Watched(trainer.PendingStep):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            by_step[self.number] = len(compilations)

    def finish(*_):
        by_step["end"] = len(compilations)

    monkeypatch.setattr(trainer, "PendingStep", Watched)
    monkeypatch.setattr(trainer, "finish_run", finish)
    cfg = change(settings, model__moe__backend="reference")
    cfg = change(cfg, evaluation__every_steps=1, checkpoint__every_steps=1)
    assert train(cfg, tmp_path) == 0
    assert by_step[1] > 0  # compilations are seen at all
    assert by_step[3] == by_step["end"], by_step


@pytest.fixture
def no_cache():
    """As in a process whose environment says nothing about a cache."""
    before = jax.config.jax_compilation_cache_dir
    compilation._configure({"jax_compilation_cache_dir": None})
    yield
    compilation._configure({"jax_compilation_cache_dir": before})


def compile_something(number):
    """Compiles a program that is not compiled elsewhere and takes its time."""
    x = jnp.ones(8)
    for _ in range(4):
        x = jax.jit(lambda x: jnp.sort(jnp.sin(x * number)))(x)


def test_programs_are_kept_in_the_runs_folder(no_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "_WORTH_KEEPING_S", 0.0)
    with compiled_programs_kept(config.Train(), tmp_path):
        compile_something(1.25)
    (machine,) = (tmp_path / compilation.FOLDER).iterdir()
    assert machine.name.startswith("cpu-")
    kept = len(list(machine.iterdir()))
    assert kept
    # Outside, nothing is kept any more.
    assert jax.config.jax_compilation_cache_dir is None
    compile_something(2.25)
    assert len(list(machine.iterdir())) == kept


def test_folder_can_be_named_or_none_wanted(no_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "_WORTH_KEEPING_S", 0.0)
    with compiled_programs_kept(config.Train(compilation_cache=f"{tmp_path}/here"), tmp_path):
        compile_something(3.25)
    with compiled_programs_kept(config.Train(compilation_cache="none"), tmp_path):
        compile_something(4.25)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_cache_of_the_environment_is_left_alone(tmp_path):
    theirs = jax.config.jax_compilation_cache_dir
    assert theirs
    with compiled_programs_kept(config.Train(), tmp_path):
        assert jax.config.jax_compilation_cache_dir == theirs
    assert not list(tmp_path.iterdir())


def test_machines_of_other_features_have_other_folders(tmp_path, monkeypatch):
    names = []
    for flags in ("avx2", "avx2 avx512f", "avx2"):
        (tmp_path / "cpuinfo").write_text(f"flags\t: {flags}\nbogomips\t: {len(names)}\n")
        monkeypatch.setattr(compilation, "_CPU_INFO", tmp_path / "cpuinfo")
        names.append(compilation._machine())
    assert names[0] == names[2] != names[1]
