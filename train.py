"""Trains a Mixture-of-Experts language model.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

The same command again continues from the newest checkpoint.
"""

import gc
import sys

from dynmoe_jax.hardware.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()
    # What is imported stays: to look through it for garbage takes a good part of the time
    # (docs/measurements.md: start-garbage).
    gc.disable()
    # Not before: what a restart imports again takes seconds.
    from dynmoe_jax import command_line
    from dynmoe_jax.training.trainer import BAD_INPUT, train

    gc.freeze()
    gc.enable()
    sys.exit(command_line.run(train, __doc__, BAD_INPUT))
