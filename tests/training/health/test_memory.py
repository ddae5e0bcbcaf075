"""What does not fit is refused before it starts, with figures that are worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dynmoe_jax import command_line, config
from dynmoe_jax.command_line import EXIT_OUT_OF_MEMORY
from dynmoe_jax.model.parameters import count_parameters
from dynmoe_jax.training import start, trainer
from dynmoe_jax.training.health import memory
from dynmoe_jax.training.health.memory import Memory, Need, OutOfMemory, advice
from dynmoe_jax.training.trainer import train

GB = 10**9
# Logits of 1000 tokens and 1000 pieces at 12 bytes: 0.012 GB; little enough not to matter.
CFG = config.Config(
    model=config.Model(
        num_layers=10,
        width=100,
        vocab_size=1000,
        max_seq_len=1000,
        moe=config.MoE(num_experts=16, top_p={"threshold": 0.4}),
    ),
    data=config.Data(seq_len=1000),
    train=config.Train(batch_size=32),
    loss=config.Loss(chunk_tokens=1000),
)


def turned(**changes):
    """CFG with leaves changed: turned(train__microbatches=2)."""
    cfg = CFG
    for name, value in changes.items():
        group, leaf = name.rsplit("__", 1)
        parts = [cfg]
        for part in group.split("__"):
            parts.append(getattr(parts[-1], part))
        new = dataclasses.replace(parts[-1], **{leaf: value})
        for part, parent in zip(reversed(group.split("__")), reversed(parts[:-1]), strict=True):
            new = dataclasses.replace(parent, **{part: new})
        cfg = new
    return cfg


def test_microbatches_are_raised_as_far_as_needed():
    # Room: 0.95 * 10 - 3 - 1 - 0.012 = 5.488 GB for 19.988 GB of activations, which 4 parts bring
    # down to 4.997 and 2 parts to 9.994; 3 do not divide 32.
    text = advice(Need(3 * GB, GB, 20 * GB), 10 * GB, CFG, 1)
    assert "raise config.train.microbatches from 1 to 4" in text
    # Two parts already, and 19.988 GB with them: 8 parts have a quarter of that.
    text = advice(Need(3 * GB, GB, 20 * GB), 10 * GB, turned(train__microbatches=2), 1)
    assert "raise config.train.microbatches from 2 to 8" in text
    # Each of 8 devices takes a multiple of one sequence: at most 4 parts.
    text = advice(Need(3 * GB, GB, 20 * GB), 10 * GB, CFG, 8)
    assert "from 1 to 4" in text
    text = advice(Need(3 * GB, GB, 30 * GB), 10 * GB, CFG, 8)
    assert "microbatches" not in text


def test_recomputation_devices_and_rows_are_named_if_they_help():
    # Layer by layer: 19.988 / 10 = 2 GB, and 10 residual streams of 32000 * 100 floats, 0.128 GB.
    text = advice(Need(3 * GB, GB, 20 * GB), 10 * GB, CFG, 1)
    assert "set config.model.remat='layer' (now 'none')" in text
    # 19.988 / 5.488 = 3.6: four devices.
    assert "share the batch among 4 devices (config.mesh.data)" in text
    # floor(0.4 * 16) + 1 = 7 rows per token.
    assert "set config.model.moe.transforms='row_budget': 2 rows a token, not 7" in text
    cfg = turned(model__remat="layer", model__moe__every_n_layers=0)
    text = advice(Need(3 * GB, GB, 20 * GB), 10 * GB, cfg, 1)
    assert "remat" not in text
    assert "row_budget" not in text


def test_large_logits_are_cut_themselves():
    # 12 bytes * 1,000,000 pieces * 1000 tokens = 12 GB of logits; half of the room is 2.75 GB.
    cfg = turned(model__vocab_size=10**6)
    text = advice(Need(3 * GB, GB, 13 * GB), 10 * GB, cfg, 1)
    assert "lower config.loss.chunk_tokens from 1000 to 229" in text


def test_model_too_large_by_itself_is_made_smaller():
    parameters = count_parameters(CFG.model)
    need = Need(12 * parameters, 4 * parameters)
    text = advice(need, 8 * parameters, CFG, 1)
    found = int(text.split("num_experts from 16 to ")[1].split(",")[0])
    for experts, fits in ((found, True), (found + 1, False)):
        fewer = turned(model__moe__num_experts=experts)
        assert (16 * count_parameters(fewer.model) <= 0.95 * 8 * parameters) == fits
    # Of 10 layers, a little less than half.
    assert "config.model.num_layers from 10 to 4" in text
    # One byte for every parameter: not even one layer fits.
    assert "lower config.model.width from 100 to about " in advice(need, parameters // 10, CFG, 1)


def test_nothing_but_shorter_sequences_helps_one_sequence():
    cfg = turned(train__batch_size=1, model__remat="layer", model__moe__every_n_layers=0)
    text = advice(Need(3 * GB, GB, 20 * GB), 10 * GB, cfg, 1)
    assert text == "lower config.data.seq_len from 1000 to 274"  # 1000 * 5.488 / 19.988


def test_absurd_model_is_refused_before_anything_is_there(settings, change, tmp_path):
    cfg = change(settings, model__moe__num_experts=10**7, model__moe__hidden_width=10**5)
    with pytest.raises(OutOfMemory, match=r"needs [\d,.]+ GB on each device, .* from 10000000 to"):
        train(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert OutOfMemory.exit_code == EXIT_OUT_OF_MEMORY


def test_step_that_will_not_fit_is_refused_before_its_first(
    settings, change, tmp_path, monkeypatch
):
    cfg = change(settings, model__moe__backend="reference")
    parameters = count_parameters(cfg.model)
    # Enough for state and gradients, 16 bytes a parameter, and for nothing else.
    monkeypatch.setattr(memory, "device_limit", lambda: 17 * parameters + 10**4)
    with pytest.raises(OutOfMemory, match=r"but a device has .*: ") as caught:
        train(cfg, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.fixture
def checked(settings, monkeypatch):
    """Memory of a run that should fit with ease."""
    monkeypatch.setattr(memory, "device_limit", lambda: 10 * GB)
    checked = Memory(settings, {"data": 1})
    checked.check_state()
    return checked


def test_error_while_running_is_explained(checked):
    sentence = r"allocating 1717986918400 bytes\), where the step was"
    with pytest.raises(OutOfMemory, match=sentence), checked.explained():
        jnp.zeros((400, 1024, 1024, 1024), jnp.float32)


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.", 12345),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.", 12345),
        ("Ran out of memory in memory space hbm. Used 1.5G of 0.7G hbm.", 3 * 2**29),
        ("RESOURCE_EXHAUSTED: something else", 0),
    ],
)
def test_bytes_that_messages_name(message, wanted):
    assert memory._asked_for(message) == wanted


def test_copy_that_checkpoints_are_written_from_counts(settings, monkeypatch):
    """On a CPU.  Parameters, two moments, gradients, and parameters and moments again: 28 bytes."""
    parameters = count_parameters(settings.model)
    monkeypatch.setattr(memory, "device_limit", lambda: 27 * parameters)
    with pytest.raises(OutOfMemory):
        Memory(settings, {"data": 1}).check_state()
    monkeypatch.setattr(memory, "device_limit", lambda: 29 * parameters + 10**5)
    Memory(settings, {"data": 1}).check_state()


@pytest.mark.slow
def test_compiler_that_runs_out_of_memory_ends_the_run_with_advice(
    settings, change, tmp_path, monkeypatch, capsys
):
    """On devices that do not say how much memory they have, so that nothing tells before."""
    cfg = change(settings, model__moe__backend="reference")
    monkeypatch.setattr(memory, "device_limit", lambda: None)
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 25.34G of 15.75G hbm."
    )

    def fail(*_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(start, "compile_step", fail)
    code = command_line.exit_code(lambda: train(cfg, tmp_path), trainer.BAD_INPUT)
    assert code == EXIT_OUT_OF_MEMORY
    printed = " ".join(capsys.readouterr().out.split())
    assert "error: Memory ran out (RESOURCE_EXHAUSTED: Ran out of memory" in printed
    assert "set config.model.remat='layer' (now 'none')." in printed


def test_other_errors_stay_what_they_are(checked):
    def fail():
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"), checked.explained():
        fail()


def test_host_memory_is_shared_by_its_devices():
    limit = memory.device_limit()
    assert 10**7 < limit * jax.local_device_count() < 10**14
