"""Peak memory of importing and exporting a model, over the model's bytes.

    python -m benchmarks.import_memory --gigabytes 1

Writes a synthetic checkpoint of the paper's 3.5B model with fewer and narrower layers, in files of
100 MB with an index, and imports, exports and loads it in processes of their own.  A peak is the
process's high-water mark of resident memory (VmHWM): Python, JAX and mapped files included.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.command import run
from dynmoe_jax import config
from dynmoe_jax.console import console
from dynmoe_jax.interop import load_hf
from dynmoe_jax.interop.architectures.mapping import parameter_slices
from dynmoe_jax.interop.architectures.registry import architecture_for
from dynmoe_jax.interop.export_model import export_model
from dynmoe_jax.interop.files.tensor_files import write_json
from dynmoe_jax.interop.files.tensor_writer import TensorWriter
from dynmoe_jax.interop.import_model import import_model
from dynmoe_jax.model import parameter_shapes
from dynmoe_jax.model.parameters import count_parameters

MODEL = config.Model(
    num_layers=1,
    width=512,
    num_heads=8,
    num_kv_heads=8,
    hidden_width=1408,
    vocab_size=16000,
    moe=config.MoE(hidden_width=1408),
)
FILE_BYTES = 10**8
MARK = 1.3
WORK = {
    "import": lambda folder: import_model(folder / "hf", folder / "run"),
    "export": lambda folder: export_model(folder / "run", folder / "back", shard_bytes=FILE_BYTES),
    "load_hf": lambda folder: load_hf(folder / "hf"),
}


def model_of(gigabytes: float, model: config.Model = MODEL) -> config.Model:
    """A model with as many layers as come nearest to a size in float32."""
    one, two = (count_parameters(dataclasses.replace(model, num_layers=n)) for n in (1, 2))
    layers = round((gigabytes * 1e9 / 4 - one) / (two - one)) + 1
    return dataclasses.replace(model, num_layers=max(1, layers))


def write_checkpoint(model: config.Model, folder: Path) -> int:
    """Writes random tensors of a model's shapes in Hugging Face's format; returns their bytes."""
    architecture = architecture_for(model)
    shapes = {path: leaf.shape for path, leaf in parameter_shapes(model).flat_state()}
    found = parameter_slices(architecture.rules, model, shapes)
    foreign = {n: ours.layout.foreign_shape(ours.shape(shapes)) for n, ours in found.items()}
    folder.mkdir()
    writer = TensorWriter(folder, foreign, "float32", FILE_BYTES)
    random = np.random.default_rng(0)
    total = sum(
        writer.write(name, random.normal(scale=0.006, size=shape))
        for name, shape in foreign.items()
    )
    settings = {"architectures": [architecture.name], **architecture.model_to_hf(model)}
    write_json(folder / "config.json", settings)
    return total


def peak_of(work: str, folder: Path) -> tuple[int, int]:
    """(bytes before the work, bytes at its peak) of a process that does nothing else."""
    command = [sys.executable, "-m", "benchmarks.import_memory", "--child", work, str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return tuple(json.loads(output.splitlines()[-1]))


def resident() -> int:
    """The most bytes that this process has had in memory so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def main() -> None:
    """Prints a line per kind of work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        before = resident()
        WORK[asked.child[0]](Path(asked.child[1]))
        print(json.dumps([before, resident()]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        total = write_checkpoint(model_of(asked.gigabytes), Path(scratch) / "hf")
        console.print(f"A checkpoint of {total / 1e9:.3f} GB; the mark is {MARK} of that.")
        for work in WORK:
            before, peak = peak_of(work, Path(scratch))
            console.print(
                f"{work:8} peak {peak / 1e9:.3f} GB = {peak / total:.2f} of the checkpoint "
                f"({before / 1e9:.3f} GB before it began)"
            )


if __name__ == "__main__":
    run(main)
