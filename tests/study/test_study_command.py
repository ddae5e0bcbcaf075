"""The study from end to end: killed and continued, its answers, its page, what it refuses."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dynmoe_jax.runs.records import from_json
from dynmoe_jax.study import __main__ as command
from dynmoe_jax.study import study as study_module
from dynmoe_jax.study.questions import QUESTIONS

TIMES = ("seconds_step", "tokens_per_second", "mfu", "model_flops_per_second")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sources of two domains: words in order, and words at random."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(120)]
    for domain in ("order", "chance"):
        lines = []
        for _ in range(150):
            start, count = draw.randrange(120), draw.randint(40, 120)
            chosen = [words[(start + i) % 120] for i in range(count)]
            if domain == "chance":
                draw.shuffle(chosen)
            lines.append(json.dumps({"text": " ".join(chosen), "domain": domain}))
        (folder / f"{domain}.jsonl").write_text("\n".join(lines))
    return f"jsonl:{folder}/*.jsonl"


def start(folder, text, *flags):
    command_line = [sys.executable, "-m", "dynmoe_jax.study", "--size=tiny", f"--workdir={folder}"]
    environment = os.environ | {"XLA_FLAGS": _one_device(os.environ["XLA_FLAGS"])}
    return subprocess.Popen(
        [*command_line, f"--data={text}", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def _one_device(flags):
    return flags.replace("device_count=8", "device_count=1")


def finished(process):
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def killed(text, tmp_path_factory):
    """(folder, what was said) of a study that was killed while MoE-Dynamic trained.

    Behind its first checkpoint, so that the run goes on from there.
    """
    folder = tmp_path_factory.mktemp("killed")
    process = start(folder, text)
    run = folder / "runs" / "dynamic" / "0"
    while not (run / "checkpoints" / "20").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run / "summary.json").exists()
    return folder, finished(start(folder, text))


@pytest.fixture(scope="module")
def record(killed):
    folder, _ = killed
    return from_json((folder / "study.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_everything_is_answered_with_an_interval(record):
    assert record["runs"]["complete"] == record["runs"]["planned"] == 9
    assert {answer["number"] for answer in record["answers"]} == set(QUESTIONS)
    for answer in record["answers"]:
        low, high = answer["interval"]
        assert low <= answer["estimate"] <= high, answer
        assert math.isfinite(low), answer
        assert math.isfinite(high), answer
        assert answer["agrees_with_paper"] in ("yes", "no", "undecided")
        assert answer["sentence"]


def test_models_have_their_figures(record):
    by_name = {model["name"]: model for model in record["models"]}
    assert by_name["top_2"]["experts_per_token_at_inference"] == 2
    assert by_name["top_1"]["experts_per_token_in_training"] == 1
    budget = by_name["dynamic_budget"]["experts_per_token_in_training"]
    assert abs(budget / by_name["dynamic"]["experts_per_token_in_training"] - 1) < 0.3
    flops = [by_name[name]["flops"] for name in ("dense", "top_1", "top_2")]
    assert flops == sorted(flops)
    assert by_name["wide_dense"]["active_parameters"] > by_name["dense"]["active_parameters"]
    assert by_name["ablation_base"]["steps"] == by_name["dynamic"]["steps"] // 2
    for model in by_name.values():
        assert 0 < model["heldout_bits_per_byte"] < 20
        assert model["seconds"] > 0


def test_the_page_has_every_question_and_its_pictures(killed, record):
    page = (killed[0] / "study.html").read_text(encoding="utf-8")
    for number, question in QUESTIONS.items():
        assert f"{number}. {question.title}" in page
    for title in (
        "Loss against active parameters",
        "Experts per token over training",
        "Experts and surprise",
        "Correlation by layer",
        "Rules changed after training",
        "Time of a step against experts",
        "Loss against FLOPs",
        "What changes the loss",
        "hard to predict",
        "Token ids that occur",
    ):
        assert title in page, title
    assert page.count("<figure") == page.count("<svg")
    assert "src=" not in page
    assert record["answers"][0]["sentence"] in page


def test_killed_and_continued_is_never_killed(killed, text, tmp_path):
    """Bit for bit, in metrics and measures, of the run that was killed and the one behind it."""
    flags = ("--models=dynamic,dynamic_budget", "--questions=3", "--processes=1")
    finished(start(tmp_path, text, *flags))
    for run in ("dynamic", "dynamic_budget"):
        there, here = (folder / "runs" / run / "0" for folder in (killed[0], tmp_path))
        assert _without_times(there) == _without_times(here)
        for file in (here / "measured").iterdir():
            assert (there / "measured" / file.name).read_text() == file.read_text()


def _without_times(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def asked(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["study", *flags])
    return command.main()


def test_a_complete_study_starts_no_worker(killed, record, text, monkeypatch):
    def no_workers(*arguments):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(study_module, "Workers", no_workers)
    folder, _ = killed
    before = (folder / "study.json").read_text()
    assert asked(monkeypatch, "--size=tiny", f"--workdir={folder}", f"--data={text}") == 0
    again = from_json((folder / "study.json").read_text())
    assert _answers(again) == _answers(record)
    (folder / "study.json").write_text(before)


def _answers(record):
    names = ("name", "estimate", "interval", "sentence")
    return [[str(answer[name]) for name in names] for answer in record["answers"]]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--size=huge",), "--size=huge must be one of tiny, laptop, gpu, paper"),
        (("--seeds=0",), "--seeds=0 must be at least 1"),
        (("--processes=-1",), "--processes=-1 must be at least 1"),
        (("--models=dynamo",), "--models=dynamo must be some of dense"),
        (("--questions=7",), "--questions=7 must be some of 1, 2, 3, 4, 5, 6"),
        (("--questions=two",), "must be numbers"),
        (("--learning_rates=0.1,-1",), "--learning_rates=-1 must be above 0"),
        (("--data=text:/nowhere/*.txt",), "/nowhere"),
        (("--items=/nowhere",), "--items=/nowhere is no folder"),
    ],
)
def test_mistakes_are_one_sentence(flags, said, monkeypatch, tmp_path, capsys):
    folder = tmp_path / "study"
    assert asked(monkeypatch, "--size=tiny", f"--workdir={folder}", *flags) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert said in printed
    assert "Traceback" not in printed
    assert not folder.exists()


def test_another_study_in_the_folder_is_refused(monkeypatch, tmp_path, capsys):
    (tmp_path / "request.json").write_text(
        json.dumps({"size": "laptop", "data": "", "rates": [0.1]})
    )
    assert asked(monkeypatch, "--size=tiny", f"--workdir={tmp_path}") == 2
    assert "--size=laptop" in capsys.readouterr().out


def test_experts_in_training_are_the_mean_over_all_steps(killed, record):
    lines = (killed[0] / "runs" / "dynamic" / "0" / "metrics.jsonl").read_text().splitlines()
    experts = {line["step"]: line["experts_per_token"] for line in map(json.loads, lines)}
    assert sorted(experts) == list(range(1, 41))
    (answer,) = [a for a in record["answers"] if a["name"] == "more_experts_than_top_2_in_training"]
    np.testing.assert_allclose(answer["estimate"], np.mean(list(experts.values())) - 2)
