"""Trains a Mixture-of-Experts language model.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

The same command again continues from the newest checkpoint.
"""

import sys

from dynmoe_jax import command_line
from dynmoe_jax.training.trainer import BAD_INPUT, train

if __name__ == "__main__":
    sys.exit(command_line.run(train, __doc__, BAD_INPUT))
