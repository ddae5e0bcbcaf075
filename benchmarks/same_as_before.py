"""Compares two checkouts: the same seed draws the same parameters, and trains to the same losses.

    git worktree add ../before 36df81e
    python -m benchmarks.same_as_before --old=../before

Both train ``configs/quickstart.py``, each by its own ``train.py`` in processes of its own: on one
device, and on eight that JAX simulates.  The new checkout gets the tokenizer and the prepared data
of the old one's run, so that both see the same batches.  It prints where the losses part, relative
to the old ones, beside the differences that are allowed, and exits with 1 if one is exceeded.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.table import Table

from benchmarks.checkout import Checkout
from benchmarks.command import run
from dynmoe_jax.console import console

LIMITS = {1: 1e-6, 10: 1e-5, 50: 1e-3}
"""Largest relative difference of the losses up to a step."""

DEVICES = (1, 8)
METRICS = ("loss", "lm_loss")

_DIGEST = """
import hashlib, jax, numpy as np, importlib.util
from flax import nnx
from dynmoe_jax import config
from dynmoe_jax.model import Decoder
spec = importlib.util.spec_from_file_location("quickstart", "configs/quickstart.py")
quickstart = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quickstart)
model = config.from_config_dict(quickstart.get_config()).model
draw = lambda key: nnx.state(Decoder(model, rngs=nnx.Rngs(params=key)), nnx.Param)
leaves = jax.tree.leaves(jax.jit(draw)(jax.random.key(0)))
print(*sorted(hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in leaves))
"""


def parameters(checkout: Checkout) -> list[str]:
    """Digests of the arrays that seed 0 draws for the quickstart's model."""
    return checkout.run("-c", _DIGEST).split()


def losses(
    checkout: Checkout, workdir: Path, steps: int, devices: int, *settings: str
) -> list[dict]:
    """The lines of metrics.jsonl of a run, one for each step."""
    checkout.run(
        "train.py",
        "--config=configs/quickstart.py",
        f"--workdir={workdir}",
        f"--config.train.steps={steps}",
        "--config.train.log_every_steps=1",
        "--config.evaluation.max_batches=1",
        "--config.evaluation.sample_tokens=1",
        # The schedule of the whole run, whatever part of it is trained.
        "--config.optimizer.schedule=constant",
        *settings,
        devices=devices,
    )
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if all(name in line for name in METRICS)]


def largest_difference(old: list[dict], new: list[dict], step: int) -> float:
    """Largest relative difference of any loss up to and including a step."""
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if a["step"] <= step]
    return max(abs(b[name] - a[name]) / abs(a[name]) for a, b in pairs for name in METRICS)


def main() -> None:
    """Prints a table of differences; exits with 1 if one is larger than allowed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", type=Path, required=True, help="root of the other checkout")
    parser.add_argument("--new", type=Path, default=Path(), help="root of this one")
    parser.add_argument("--steps", type=int, default=max(LIMITS), help="of each run")
    asked = parser.parse_args()
    old, new = Checkout(asked.old.resolve()), Checkout(asked.new.resolve())
    good = parameters(old) == parameters(new)
    console.print(f"parameters of seed 0: {'the same' if good else 'DIFFERENT'}")
    table = Table("devices", "up to step", "largest difference", "allowed", "", box=None)
    with tempfile.TemporaryDirectory() as scratch:
        for devices in DEVICES:
            before, after = Path(scratch) / f"old{devices}", Path(scratch) / f"new{devices}"
            one = losses(old, before, asked.steps, devices)
            other = losses(
                new,
                after,
                asked.steps,
                devices,
                f"--config.data.tokenizer={before / 'tokenizer.model'}",
                f"--config.data.directory={before / 'data'}",
            )
            for step, allowed in LIMITS.items():
                if step <= asked.steps:
                    found = largest_difference(one, other, step)
                    met = found <= allowed
                    good &= met
                    row = (str(devices), str(step), f"{found:.2g}", f"{allowed:g}")
                    table.add_row(*row, "" if met else "EXCEEDED")
    console.print(table)
    sys.exit(not good)


if __name__ == "__main__":
    run(main)
