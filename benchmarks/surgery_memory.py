"""Peak memory of operations that need no data, on synthetic models of a given size.

Each operation is the command, with its proof or comparison on text, in a process of its own; the
peak is VmHWM: Python, JAX, its compiler and mapped files included.
"""

import argparse
import dataclasses
import functools
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from flax import nnx

from benchmarks.columns import columns
from benchmarks.import_memory import MODEL, model_of
from benchmarks.process import ROOT, ours, ran
from benchmarks.surgery_part import Part
from benchmarks.timing import Mark, Ratio
from benchmarks.worker import WorkerError
from dynmoe_jax import config
from dynmoe_jax.data.tokenizers.sentencepiece import train_tokenizer
from dynmoe_jax.edits.places import stored_in
from dynmoe_jax.runs.begun import make_folder
from dynmoe_jax.runs.checkpoint import IMPORTED, Checkpoints
from dynmoe_jax.runs.saving.streamed import Index, StreamedArray

SHARE, REST = 0.35, 6e8
DENSE = dataclasses.replace(
    MODEL, width=1024, num_heads=16, num_kv_heads=16, hidden_width=2816,
    moe=config.MoE(every_n_layers=0),
)  # fmt: skip
OPERATIONS = {
    "upcycle": (DENSE, ["--num_experts=8"]),
    "stack": (MODEL, ["--times=2"]),
}
HEADINGS = ("operation", "parent GB", "peak MB", "may be MB", "seconds", "processor's seconds")


def measure(asked: argparse.Namespace) -> Part:
    """Measures every operation and returns the marks."""
    rows, marks, figures = [], [], {}
    with tempfile.TemporaryDirectory(prefix="surgery_memory_") as name:
        for operation, (model, settings) in OPERATIONS.items():
            parent, to = Path(name) / "parent", Path(name) / "result"
            print(f"Writing a model of {asked.gigabytes:g} GB for {operation} …", file=sys.stderr)
            size = write_run(parent, model_of(asked.gigabytes, model))
            command = ["-m", "dynmoe_jax.surgery", operation, f"--from={parent}", f"--to={to}"]
            done = ran([sys.executable, *command, f"--data={text()}", *settings], ours())
            if done.exit_code:
                print(done.said, file=sys.stderr)
                raise WorkerError(f"{operation} failed; see above.")
            for folder in (parent, to):
                shutil.rmtree(folder)
            most = SHARE * size + REST
            share = done.peak_bytes / most
            said = f"{operation}, peak memory / ({SHARE} of the parent + {REST / 1e6:.0f} MB)"
            marks.append(Mark(said, 1.0, Ratio(share, share, share)))
            megabytes = (f"{done.peak_bytes / 1e6:,.0f}", f"{most / 1e6:,.0f}")
            seconds = (f"{done.seconds:.0f}", f"{done.cpu_seconds:.0f}")
            rows.append((operation, f"{size / 1e9:.2f}", *megabytes, *seconds))
            figures[operation] = {"parent_bytes": size, "peak_bytes": done.peak_bytes}
    return Part(columns([HEADINGS, *rows]), marks, figures)


def text() -> str:
    """Text to measure with, as ``--data`` takes it: documentation of this project."""
    return f"text:{ROOT}/docs/*.md"


def write_run(folder: Path, model: config.Model) -> int:
    """Writes a run of a model of drawn numbers; returns the bytes of its parameters."""
    cfg = config.Config(model=model, data=config.Data(seq_len=model.max_seq_len))
    make_folder(folder)
    documents = (path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md")))
    tokenizer = train_tokenizer(documents, 512, folder / "tokenizer.model")
    random, leaves, size = np.random.default_rng(0), [], 0
    for stored, leaf in stored_in(model):
        make = functools.partial(_drawn, random, stored.shape)
        array = StreamedArray(stored.shape, make, stored.leading)
        leaves.append((stored.path, leaf.replace(array)))
        size += 4 * array.size
    position = {"tokenizer": tokenizer.fingerprint, IMPORTED: "drawn"}
    checkpoints = Checkpoints(folder, cfg.checkpoint)
    checkpoints.save(0, {"params": nnx.from_flat_state(leaves)}, position, cfg)
    checkpoints.close()
    return size


def _drawn(random: np.random.Generator, shape: tuple[int, ...], index: Index) -> np.ndarray:
    own = shape[len(index) :]
    return np.float32(0.02) * random.standard_normal(own, np.float32) + np.float32(len(own) == 1)
