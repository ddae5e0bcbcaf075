"""Whatever has happened to the files of a run: it goes on from what is whole, or says why not."""

import dataclasses
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.data import DataError, train_tokenizer
from dynmoe_jax.runs.begun import saved_config
from dynmoe_jax.runs.checkpoint import FOLDER, ITEMS, Checkpoints, replace_config
from dynmoe_jax.runs.disk import DiskError, disk_errors
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.runs.recovery import DAMAGED_FOLDER, recover
from dynmoe_jax.runs.saving import integrity
from dynmoe_jax.runs.text import TRAINED


@pytest.fixture
def folder(workdir):
    """Of the newest checkpoint, 4; the one before is 3."""
    return workdir / FOLDER / "4"


@pytest.fixture
def recovered(workdir):
    """The step that the run would go on after."""

    def recovered():
        checkpoints = Checkpoints(workdir, config.Checkpoint())
        try:
            return recover(checkpoints)
        finally:
            checkpoints.close()

    return recovered


def listed_files(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def largest_file(folder):
    return max(listed_files(folder), key=lambda path: path.stat().st_size)


def flip_bit(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def test_whole_checkpoint_is_continued_without_a_word(workdir, recovered, capsys):
    assert recovered() == 4
    assert capsys.readouterr().out == ""
    assert not (workdir / DAMAGED_FOLDER).exists()


def test_every_single_flipped_bit_is_found(folder):
    """In the arrays, too, where Orbax does not find one."""
    draw = random.Random(0)
    checked = [p for p in listed_files(folder) if p.name not in integrity._NOT_LISTED]
    assert any(path.stat().st_size > 10_000 for path in checked)
    for path in [*checked, *[largest_file(folder)] * 20]:
        before = path.read_bytes()
        flip_bit(path, draw)
        damage = integrity.find_damage(folder, ITEMS)
        assert damage == f"{path.relative_to(folder).as_posix()} has changed"
        path.write_bytes(before)
    assert integrity.find_damage(folder, ITEMS) is None


def _flip(folder):
    flip_bit(largest_file(folder), random.Random(0))


def _truncate(folder):
    path = largest_file(folder)
    os.truncate(path, path.stat().st_size // 2)


def test_other_settings_leave_a_checkpoint_whole_and_damage_of_arrays_found(workdir, folder):
    cfg = dataclasses.replace(saved_config(workdir), train=config.Train(steps=77))
    replace_config(workdir, 4, cfg)
    assert integrity.find_damage(folder, ITEMS) is None
    assert saved_config(workdir).train.steps == 77
    flip_bit(largest_file(folder), random.Random(0))
    replace_config(workdir, 4, cfg)
    assert integrity.find_damage(folder, ITEMS).endswith("has changed")


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (_flip, "has changed"),
        (_truncate, r"has [\d,]+ bytes instead of [\d,]+"),
        (lambda folder: shutil.rmtree(folder / "data"), "data/.* is missing"),
        (lambda folder: shutil.rmtree(folder / "state"), "state/.* is missing"),
        (lambda folder: (folder / "config" / "metadata").write_text("{}"), "config/metadata has"),
        (lambda folder: (folder / integrity.FILE_NAME).write_text("[1]"), "cannot be read"),
        (lambda folder: [shutil.rmtree(folder), folder.mkdir()], "state is missing"),
    ],
)
def test_damaged_newest_falls_back_to_the_one_before_and_names_both(
    workdir, folder, recovered, capsys, harm, sentence
):
    harm(folder)
    assert recovered() == 3
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 1
    for part in ("step 4 is damaged", "the one of step 3", str(workdir / DAMAGED_FOLDER / "4")):
        assert part in printed
    assert re.search(sentence, printed)
    # It is out of the way of the step 4 that is to come, and nothing of it is lost.
    assert not folder.exists()
    assert (workdir / DAMAGED_FOLDER / "4").is_dir()
    assert recovered() == 3
    assert capsys.readouterr().out == ""


def test_run_with_damaged_checkpoints_alone_is_refused_not_begun_anew(workdir, recovered):
    for step in ("3", "4"):
        shutil.rmtree(workdir / FOLDER / step / "state")
    with pytest.raises(CheckpointError, match=r"Every checkpoint .* step 4, state/.* is missing"):
        recovered()
    assert (workdir / FOLDER / "4").is_dir()


def test_checkpoint_of_an_earlier_version_has_no_checksums_and_is_continued(folder, recovered):
    (folder / integrity.FILE_NAME).unlink()
    assert recovered() == 4


def test_what_cannot_be_read_although_nothing_told_so_is_one_sentence(workdir, folder, state):
    (folder / integrity.FILE_NAME).unlink()
    os.truncate(folder / "state" / "manifest.ocdbt", 10)
    checkpoints = Checkpoints(workdir, config.Checkpoint())
    with pytest.raises(CheckpointError, match=r"checkpoints/4 cannot be read .* move it") as caught:
        checkpoints.restore(4, state)
    assert "\n" not in str(caught.value)
    checkpoints.close()


@pytest.mark.parametrize("listed", [True, False])
def test_settings_are_read_from_the_newest_checkpoint_that_has_them(
    workdir, folder, settings, listed
):
    path = folder / "config" / "metadata"
    if listed:  # damage that reads well would refuse the run for a setting that nobody changed
        path.write_text(path.read_text().replace('"width": 16', '"width": 17'))
    else:
        path.write_text("no json")
        (folder / integrity.FILE_NAME).unlink()
    assert saved_config(workdir) == settings


def test_loading_a_run_passes_over_a_damaged_checkpoint_and_moves_nothing(
    workdir, folder, state, capsys
):
    _truncate(folder)
    _, decoder, _ = load_run(workdir)
    assert "step 4 is damaged" in capsys.readouterr().out
    assert folder.exists()
    wanted = state.params["embedding_VD"].get_value() + 1  # step 3's
    np.testing.assert_array_equal(decoder.embedding_VD.get_value(), wanted)


def test_other_tokenizer_than_the_models_is_refused(workdir):
    train_tokenizer(["some other words of a text"] * 50, 275, workdir / TRAINED)
    with pytest.raises(DataError, match=r"tokenizer.model has changed since the checkpoint"):
        load_run(workdir)
    (workdir / TRAINED).unlink()
    with pytest.raises(DataError, match=r"tokenizer.model is missing; bring back"):
        load_run(workdir)


FULL_DISK = """
import resource, sys
from pathlib import Path
import jax.numpy as jnp
from dynmoe_jax import config
from dynmoe_jax.runs.checkpoint import CheckpointError, Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), config.Checkpoint())
state = {"x": jnp.arange(200_000.0) * 1.1}
checkpoints.save(1, state, {}, config.Config())
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    checkpoints.save(2, state, {}, config.Config())
    while True:
        checkpoints.check()
except CheckpointError as error:
    print(error)
checkpoints.close()
"""


def test_full_disk_is_told_at_once_and_leaves_the_checkpoint_before(tmp_path):
    """A limit on the size of files stands in for the disk: the system refuses just the same."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "The checkpoint of step 2 in" in done.stdout
    assert "File too large" in done.stdout
    assert "the one of step 1 is whole; make room" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr
    checkpoints = Checkpoints(tmp_path, config.Checkpoint())
    assert recover(checkpoints) == 1
    checkpoints.save(2, {"x": jnp.arange(10.0)}, {}, config.Config())
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["1", "2"]


def test_full_disk_elsewhere_is_one_sentence_too(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with (
            pytest.raises(DiskError, match=r"File too large\); make room") as caught,
            disk_errors(tmp_path),
            (tmp_path / "metrics.jsonl").open("w") as file,
        ):
            file.write("x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        Path(tmp_path / "missing").read_text()


def test_save_that_fails_while_another_is_asked_for_is_told(workdir, state, settings, monkeypatch):
    checkpoints = Checkpoints(workdir, config.Checkpoint())

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dynmoe_jax.runs.checkpoint.write_checksums", no_room)
    checkpoints.save(5, state, {}, settings)
    with pytest.raises(CheckpointError, match=r"step 5 .*No space left .*one of step 4 is whole"):
        checkpoints.save(6, jax.tree.map(jnp.copy, state), {}, settings)
    checkpoints.close()
    assert sorted(p.name for p in (workdir / FOLDER).iterdir() if p.name.isdigit()) == ["3", "4"]
