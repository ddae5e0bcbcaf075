"""The record of a finished run, and the closing table that is printed from it."""

import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from dynmoe_jax.runs.formatting import clock, compact, duration
from dynmoe_jax.runs.summary import (
    DomainResult,
    HeldOut,
    Sample,
    Summary,
    read_summary,
    write_summary,
)
from dynmoe_jax.training.log import progress, summary_tables


def make_summary(layers=4, domains=("code", "prose", "docs"), **changes):
    by_layer = [1.5 + 0.25 * layer for layer in range(layers)]
    mean = sum(by_layer) / layers if layers else math.nan
    whole = HeldOut(
        loss=3.2104,
        bits_per_byte=1.441,
        unigram_entropy=6.0251,
        domains={
            name: DomainResult(3.0 + index, 1.25 + index, 123_456, mean + index / 10, by_layer)
            for index, name in enumerate(domains)
        },
        experts_per_token_by_layer=by_layer,
        load_by_layer=[[value / 16] * 16 for value in by_layer],
        histogram_by_layer=[[0, 10, 20, 5]] * layers,
    )
    record = Summary(
        complete=True,
        step=1200,
        steps=1200,
        parameters=11_800_000,
        active_parameters=4.3e6,
        heldout=whole,
        tokens_per_second=13_412.0,
        mfu=math.nan,
        seconds={"data preparation": 31.2, "compile": 14.8, "step": 231.0, "total": 293.4},
        sample=Sample("The ", "list is\nempty.", [("list", 2.0), (" is\nempty.", 3.0)]),
        paths={"metrics": "metrics.jsonl", "report": "report.html"},
    )
    return dataclasses.replace(record, **changes)


@pytest.fixture
def screen(monkeypatch):
    """Shows prints as a log of a given width: ``screen(width)`` then ``.getvalue()``."""

    def start(width, terminal=False):
        file = io.StringIO()
        console = Console(file=file, width=width, force_terminal=terminal, highlight=False)
        monkeypatch.setattr(summary_tables, "console", console)
        monkeypatch.setattr(progress, "console", console)
        return file

    return start


def printed(screen, summary, tmp_path, width=100):
    file = screen(width)
    summary_tables.print_summary(summary, tmp_path)
    return file.getvalue()


def test_summary_comes_back_as_it_was_written(tmp_path):
    summary = make_summary(mfu=0.41)
    path = write_summary(tmp_path, summary)
    assert read_summary(tmp_path) == summary
    assert json.loads(path.read_text())["heldout"]["domains"]["code"]["tokens"] == 123_456


def test_no_summary_is_none_so_that_a_new_run_starts(tmp_path):
    assert read_summary(tmp_path) is None


def test_unknown_mfu_stays_valid_json_and_comes_back_as_nan(tmp_path):
    path = write_summary(tmp_path, make_summary())
    assert json.loads(path.read_text())["mfu"] is None
    assert math.isnan(read_summary(tmp_path).mfu)


def test_rewriting_is_atomic(tmp_path, monkeypatch):
    write_summary(tmp_path, make_summary(step=7))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_summary(tmp_path, make_summary(step=8))
    assert read_summary(tmp_path).step == 7


def test_sample_with_half_a_character_does_not_cost_the_summary(tmp_path):
    write_summary(tmp_path, make_summary(sample=Sample("The ", "bytes \ud800 end")))
    assert read_summary(tmp_path).sample.text == "bytes ? end"


def test_a_dense_model_comes_back_and_prints_without_experts(tmp_path, screen):
    summary = make_summary(layers=0)
    write_summary(tmp_path, summary)
    assert read_summary(tmp_path).heldout.experts_per_token_by_layer == []
    text = printed(screen, summary, tmp_path)
    assert "expert" not in text.lower()
    assert "nan" not in text


def test_table_holds_every_number_that_was_promised(tmp_path, screen):
    text = printed(screen, make_summary(), tmp_path)
    wanted = "3.210 6.025 2.81 1.441 1.88 11.8M 4.3M 13,412 code prose docs 1.50 2.25 14.8 231.0"
    assert [word for word in wanted.split() if word not in text] == []
    assert "list is" in text


@pytest.mark.parametrize("layers", [0, 1, 4, 13, 48])
@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_line_runs_over_the_edge(screen, layers, width):
    summary = make_summary(layers=layers, domains=("code", "a very long name of a domain " * 4))
    text = printed(screen, summary, Path("runs/quickstart"), width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("\n") < 125
    for layer in range(layers):
        assert f"{1.5 + 0.25 * layer:.2f}" in text


def test_a_path_is_never_broken_so_that_it_can_be_copied(screen):
    workdir = Path("/somewhere") / ("deep" * 30)
    assert f"{workdir / 'report.html'}\n" in printed(screen, make_summary(), workdir, 80)


def test_markup_and_control_characters_in_text_are_printed_as_they_are(tmp_path, screen):
    sample = Sample("[red]", "[/nothing] \x1b[2J end")
    summary = make_summary(sample=sample, domains=("[bold]x[/bold]", "[/oops]"))
    text = printed(screen, summary, tmp_path)
    assert "[red][/nothing]" in text
    assert "[bold]x[/bold]" in text
    assert "\x1b" not in text


def test_not_finite_results_are_dashes(tmp_path, screen):
    bad = dataclasses.replace(make_summary().heldout, loss=math.nan, bits_per_byte=math.inf)
    text = printed(screen, make_summary(heldout=bad, tokens_per_second=math.nan), tmp_path)
    assert "nan" not in text
    assert "inf" not in text


def test_shares_of_time_add_up_even_if_something_was_not_measured():
    summary = make_summary()
    shares = [summary.share(seconds) for seconds in summary.activities().values()]
    assert sum(shares) == pytest.approx(1.0)
    assert math.isnan(make_summary(seconds={"step": 3.0}).share(3.0))


def test_stopped_run_is_not_called_complete(tmp_path, screen):
    text = printed(screen, make_summary(complete=False, step=300), tmp_path)
    assert "Stopped after 300 of 1,200 steps" in text


def logged(loss=4.25, **more):
    return {"loss": loss, "experts_per_token": 2.5, "tokens_per_second": 12_345.6, **more}


def test_progress_in_a_log_is_one_aligned_line_per_logged_step(screen):
    file = screen(100)
    with progress.TrainingProgress(0, 1000) as shown:
        shown.update(1, None)
        shown.update(9, logged(loss=10.0))
        shown.update(10, None)
        shown.update(1000, logged())
    lines = file.getvalue().splitlines()
    assert len(lines) == 2
    assert len(lines[0]) == len(lines[1])
    assert all(word in lines[1] for word in ("1,000/1,000", "4.25", "2.50", "12,346", "0:00 left"))


def test_progress_in_a_log_does_not_wrap_in_a_narrow_window(screen):
    file = screen(40)
    with progress.TrainingProgress(0, 1000) as shown:
        shown.update(9, logged())
    assert file.getvalue().count("\n") == 1


def test_progress_counts_speed_from_where_the_run_was_resumed(screen, monkeypatch):
    file, now = screen(100), iter([100.0, 110.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    with progress.TrainingProgress(500, 1000) as shown:
        shown.update(501, None)
        shown.update(511, logged())
    assert "8:09 left" in file.getvalue()


def test_progress_of_a_dense_model_has_no_experts(screen):
    file = screen(100)
    with progress.TrainingProgress(0, 10) as shown:
        shown.update(5, {"loss": math.nan, "tokens_per_second": 10.0})
    assert "experts" not in file.getvalue()
    assert "nan" not in file.getvalue()


def test_progress_on_a_terminal_redraws_one_bar(screen):
    file = screen(80, terminal=True)
    with progress.TrainingProgress(0, 10_000) as shown:
        shown.update(10_000, logged())
    frames = [line for line in file.getvalue().splitlines() if "step 10,000/10,000" in line]
    assert "loss 4.250  experts 2.50  12.3k tokens/s  0:00 left" in frames[-1]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (999_960, "1.0M"), (1_234, "1.2k"), (3.488e9, "3.5B")],
)
def test_compact_numbers_round_into_the_next_unit(number, text):
    assert compact(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.96, "10 s"), (59.7, "1 min 00 s"), (3599.8, "1 h 00 min")]
)
def test_durations_round_into_the_next_unit(seconds, text):
    assert duration(seconds) == text
    assert "60" not in clock(seconds)


def test_what_was_left_out_is_said_with_its_reason(tmp_path):
    reason = "config.model.moe.router='ahead' looks at later tokens: it cannot write."
    left_out = {"sample": reason, "generation": reason}
    write_summary(tmp_path, make_summary(sample=None, left_out=left_out))
    found = read_summary(tmp_path)
    assert (found.sample, found.left_out) == (None, left_out)
    assert found.reasons() == [f"No sample, generation: {reason}"]
    assert [str(line) for line in summary_tables._sample(found)] == found.reasons()
    # A summary of before there was anything to leave out.
    record = json.loads((tmp_path / "summary.json").read_text())
    del record["left_out"]
    (tmp_path / "summary.json").write_text(json.dumps(record))
    assert read_summary(tmp_path).left_out == {}
