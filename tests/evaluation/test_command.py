"""The command: results on disk, what it prints, what it refuses."""

import dataclasses
import json
import os
import shutil
import sys

import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.evaluation import __main__ as command
from dynmoe_jax.evaluation.scoring import scoring
from dynmoe_jax.model import decoder_structure
from dynmoe_jax.registry import TRANSFORMS
from dynmoe_jax.routing.transforms import Transform
from dynmoe_jax.runs import checkpoint


@pytest.fixture
def run(monkeypatch, capsys):
    """flags -> (exit code, what was printed)."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, flags)])
        code = command.main()
        return code, capsys.readouterr().out

    return call


def test_perplexity_of_files_by_domain(run, workdir, tmp_path):
    for name in ("one", "two"):
        line = json.dumps({"text": f"Text of domain {name}. " * 9, "domain": name})
        (tmp_path / f"{name}.jsonl").write_text(line + "\n")
    out = tmp_path / "out"
    source = f"--perplexity=jsonl:{tmp_path}/*.jsonl"
    code, printed = run(f"--workdir={workdir}", source, f"--output={out}", "--window=32")
    assert code == 0
    record = json.loads((out / "perplexity.json").read_text())
    assert (record["window"], record["stride"]) == (32, 16)
    assert list(record["domains"]) == ["one", "two"]
    assert record["all"]["documents"] == 2
    whole = record["all"]
    assert whole["bits_per_byte"] == pytest.approx(
        whole["loss"] * whole["tokens"] / np.log(2) / whole["bytes"]
    )
    assert len(whole["experts_per_token_by_layer"]) == 2
    assert "perplexity.json" in printed.replace("\n", "")


@pytest.fixture(scope="module")
def imported(state, settings, tokenizer, tmp_path_factory):
    """As an import leaves it: ``data.seq_len`` is its default, which means nothing."""
    folder = tmp_path_factory.mktemp("imported")
    tokenizer.save(folder / tokenizer.name_in_run)
    cfg = dataclasses.replace(settings, data=config.Data())
    checkpoints = checkpoint.Checkpoints(folder, config.Checkpoint())
    position = {"tokenizer": tokenizer.fingerprint, checkpoint.IMPORTED: "theirs"}
    checkpoints.save(0, {"params": state.params}, position, cfg)
    checkpoints.close()
    return folder


def test_an_imported_model_reads_as_much_as_it_has_room_for(run, imported, workdir, tmp_path):
    """And a trained run what it was trained on, which is said where it is less."""
    (tmp_path / "a.txt").write_text("Some text. " * 9)
    flags = f"--perplexity=text:{tmp_path}/a.txt", f"--output={tmp_path}/out", "--stride=8"
    said = "reads 512 tokens at once, what the run was trained on (config.data.seq_len); it has "
    cases = {
        (imported,): (4096, None),
        (imported, "--window=64"): (64, "reads 64 tokens at once, as --window says; it has room"),
        (workdir,): (512, said + "room for 4,096 (--window)."),
        (workdir, "--window=5000"): (5000, "--window=5000 is more than the 4,096 positions"),
    }
    for (folder, *more), (window, words) in cases.items():
        code, printed = run(f"--workdir={folder}", *flags, *more)
        assert code == 0
        assert json.loads((tmp_path / "out" / "perplexity.json").read_text())["window"] == window
        assert words in printed if words else "at once" not in printed


MISTAKES = {
    ("--tasks=",): "nothing to evaluate",
    ("--tasks=piqa", "--limit=0"): "--limit=0 must be at least 1",
    ("--perplexity=jsonl:",): "jsonl:",
    ("--perplexity=text:/nowhere/*.txt",): "matches no file",
    ("--perplexity=python", "--window=8", "--stride=9"): "--stride=9",
}


@pytest.mark.parametrize("flags", MISTAKES, ids=" ".join)
def test_mistakes_are_one_sentence(run, workdir, flags):
    code, printed = run(f"--workdir={workdir}", *flags)
    assert code == 2
    assert MISTAKES[flags] in printed.replace("\n", " ")


def test_a_folder_without_a_run_is_one_sentence(run, tmp_path):
    code, printed = run(f"--workdir={tmp_path}", "--perplexity=python")
    assert code == 2
    assert "holds no run" in printed


def test_no_choice_is_dropped_where_the_run_had_a_budget(decoder, settings):
    structure, params = nnx.split(decoder)
    del structure
    budgets = {"transforms": "row_budget", "row_budget": {"rows_per_token": 1.0}}
    for budget in (budgets, {"backend": "capacity"}):
        moe = dataclasses.replace(settings.model.moe, **budget)
        model = dataclasses.replace(settings.model, moe=moe)
        tight = nnx.merge(decoder_structure(model), params)
        assert command.without_budget(tight).config == settings.model
    assert command.without_budget(decoder) is decoder


@dataclasses.dataclass(frozen=True)
class Skip(Transform):
    """A transform that looks at one token at a time, and leaves its choices as they are."""

    def __call__(self, routing, given):
        return routing


def test_what_a_token_drops_by_itself_is_dropped_here_too(decoder, settings):
    params = nnx.split(decoder)[1]
    with TRANSFORMS.temporarily("skip", Skip):
        moe = dataclasses.replace(settings.model.moe, transforms="skip,row_budget")
        model = dataclasses.replace(settings.model, moe=moe)
        kept = command.without_budget(nnx.merge(decoder_structure(model), params))
    assert kept.config.moe.transforms == "skip"


@pytest.fixture(scope="module")
def small_index():
    """The index of all tasks takes seconds to build; a few folders of it are enough here."""
    lm_eval = pytest.importorskip("lm_eval.tasks", reason="needs the extra eval")
    folder = str(next(iter(lm_eval.__path__)))
    names = ("piqa", "hellaswag", "arc", "commonsense_qa")
    return lm_eval.TaskManager(
        include_path=[f"{folder}/{name}" for name in names], include_defaults=False
    )


def test_tasks_their_tables_their_files_and_again_from_the_file(
    run, workdir, items, tmp_path, small_index, monkeypatch
):
    monkeypatch.setattr("dynmoe_jax.evaluation.harness.local_tasks._manager", lambda: small_index)
    names = ["piqa", "hellaswag", "arc_easy", "commonsense_qa"]
    flags = [f"--workdir={workdir}", f"--tasks={','.join(names)}", f"--data_dir={items}"]
    flags += ["--limit=3", f"--output={tmp_path}"]
    code, printed = run(*flags)
    assert code == 0
    assert "HellaSwag" in printed
    assert "1.76" in printed  # the paper's
    first = json.loads((tmp_path / "results.json").read_text())
    assert list(first["results"]) == sorted(names) or set(first["results"]) == set(names)
    assert first["n-samples"]["piqa"] == {"original": 8, "effective": 3}
    assert set(first["experts_per_token"]) == set(names)
    use = first["experts_per_token"]["piqa"]
    assert use["mean"] == pytest.approx(np.mean(use["by_layer"]))
    assert 0 < first["tokens_read"] < first["tokens_asked"]
    samples = (tmp_path / "samples_piqa.jsonl").read_text().splitlines()
    assert len(samples) == 3
    accuracy = np.mean([json.loads(line)["acc"] for line in samples])
    assert first["results"]["piqa"]["acc,none"] == pytest.approx(accuracy)
    page = (tmp_path / "tasks.html").read_text()
    assert page.count("<figure>") == 2
    assert "heat" in page

    def fail(*args):
        raise AssertionError("an answer was computed again")

    monkeypatch.setattr(scoring, "_score", fail)
    code, printed = run(*flags)
    again = json.loads((tmp_path / "results.json").read_text())
    assert code == 0
    assert again["results"] == first["results"]
    assert again["experts_per_token"] == first["experts_per_token"]


def test_folders_and_texts_that_are_not_utf_8_end_in_no_traceback(run, workdir, tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9 [1]")
    shutil.copytree(workdir, odd)
    (odd / "a.txt").write_bytes(b"Some text. ")
    (odd / "b.txt").write_bytes(b"caf\xe9")
    flags = f"--perplexity=text:{tmp_path}/*/*.txt", "--window=64"
    code, printed = run(f"--workdir={workdir}", *flags, f"--output={odd}/out")
    assert code == 0
    assert r"caf\xe9 [1]/b.txt is left out: not UTF-8 at byte 3." in printed
    assert json.loads((odd / "out" / "perplexity.json").read_text())["all"]["documents"] == 1
    code, printed = run(f"--workdir={odd}", *flags)
    assert code == 2
    assert r"caf\xe9 [1]' is no name in UTF-8, which checkpoints need; rename" in printed
