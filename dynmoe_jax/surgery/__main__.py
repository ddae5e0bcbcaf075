"""Starts the command of surgery (:mod:`.program`)."""

import gc
import sys

from dynmoe_jax.hardware.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    # Trainings of a recipe, which inherit what it starts with, compute more than they stream.
    restart_with_huge_pages(keep_little=not any(word.startswith("--recipe") for word in sys.argv))
    # As for training: what is imported stays (docs/measurements.md: start-garbage).
    gc.disable()
    from dynmoe_jax.command_line import exit_code
    from dynmoe_jax.surgery.program import BAD_INPUT, main

    gc.freeze()
    gc.enable()
    sys.exit(exit_code(main, BAD_INPUT))
