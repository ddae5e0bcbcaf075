"""Models of Hugging Face's format, in and out.

    python -m dynmoe_jax.interop import --from HF_DIR --to WORKDIR
    python -m dynmoe_jax.interop import --from model.gguf --to WORKDIR
    python -m dynmoe_jax.interop export --from WORKDIR --to HF_DIR --dtype bfloat16

What is imported is a run's folder: inference, evaluation and export read it as they read one that
was trained here.  docs/huggingface.md says which architectures there are.
"""

import argparse
import sys
from pathlib import Path

from dynmoe_jax.command_line import exit_code
from dynmoe_jax.console import console
from dynmoe_jax.data import DataError
from dynmoe_jax.interop.export_model import SHARD_BYTES, export_model
from dynmoe_jax.interop.files.tensor_writer import DTYPES
from dynmoe_jax.interop.import_model import import_model
from dynmoe_jax.model.parameters import count_parameters
from dynmoe_jax.runs.errors import CheckpointError

BAD_INPUT = (CheckpointError, DataError)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dynmoe_jax.interop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("import", help="a foreign model becomes a run's folder")
    into.add_argument(
        "--from", dest="source", type=Path, required=True, help="folder, or .gguf file"
    )
    into.add_argument("--to", type=Path, required=True, help="the run's folder; holds no run yet")
    out = commands.add_parser("export", help="a run's model becomes a folder for transformers")
    out.add_argument("--from", dest="source", type=Path, required=True, help="the run's folder")
    out.add_argument("--to", type=Path, required=True, help="a folder that is empty or not there")
    out.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    out.add_argument(
        "--shard_gigabytes",
        type=float,
        default=SHARD_BYTES / 1e9,
        help="size of the largest file (default: %(default)g GB)",
    )
    out.add_argument(
        "--best", action="store_true", help="the checkpoint of the lowest held-out loss"
    )
    return parser.parse_args(arguments)


def main(asked: argparse.Namespace) -> int:
    """Does what was asked for."""
    if asked.command == "import":
        model = import_model(asked.source, asked.to).model
        console.print(f"{count_parameters(model):,} parameters in {asked.to}.", soft_wrap=True)
        return 0
    architecture = export_model(
        asked.source,
        asked.to,
        dtype=asked.dtype,
        shard_bytes=round(asked.shard_gigabytes * 1e9),
        best=asked.best,
    )
    console.print(f"Written as {architecture.name} to {asked.to}.", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(parse(sys.argv[1:])), BAD_INPUT))
