"""The harness without its bars and its advice: this project shows its own."""

import contextlib
import functools
import logging
from collections.abc import Iterator

import datasets
from tqdm import tqdm


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Within it, the harness and its libraries print no bars and no advice of their own."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    draw = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(draw, disable=True)
    try:
        yield
    finally:
        logger.setLevel(before)
        if shown:
            datasets.enable_progress_bar()
        tqdm.__init__ = draw
