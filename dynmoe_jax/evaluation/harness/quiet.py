"""The harness without its bars and its advice: this project shows its own."""

import contextlib
import functools
import logging
import subprocess
from collections.abc import Iterator

import datasets
from lm_eval import evaluator
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
    ask_git, evaluator.get_git_commit_hash = evaluator.get_git_commit_hash, _git_hash
    try:
        yield
    finally:
        logger.setLevel(before)
        if shown:
            datasets.enable_progress_bar()
        tqdm.__init__ = draw
        evaluator.get_git_commit_hash = ask_git


def _git_hash() -> str | None:
    """As the harness's own, which lets git complain on the terminal outside of a repository."""
    with contextlib.suppress(OSError):  # there is no git
        asked = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True)
        return asked.stdout.strip() or None
    return None
