"""Models that are read as from a disk, and batches with padding."""

import types

import numpy as np
import pytest
from flax import nnx

from tests.model.conftest import draw_decoder, small_model
from tests.small_run import corpus, settings, state, tokenizer, workdir

__all__ = ["corpus", "settings", "state", "tokenizer", "workdir"]

B, L, V = 2, 8, 32


class OnDisk:
    """Gives a decoder's parameters, each time in a new array."""

    def __init__(self, decoder):
        self.config = types.SimpleNamespace(model=decoder.config)
        self.decoder = decoder
        self._params = dict(nnx.state(decoder).flat_state())
        self.reads = 0

    def read(self, path, index=()):
        self.reads += 1
        return np.array(self._params[path][...][index])


def drawn_batches(rows=((8, 5), (7, 0), (8, 8)), seed=0):
    """Batches whose rows have so many valid tokens."""
    random, batches = np.random.default_rng(seed), []
    for valid in rows:
        tokens, targets = random.integers(0, V, (2, B, L)).astype(np.int32)
        segments = (np.arange(L) < np.array(valid)[:, None]).astype(np.int32)
        positions = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
        batches.append(
            {
                "tokens": tokens,
                "targets": targets,
                "segment_ids": segments,
                "positions": np.ascontiguousarray(positions),
            }
        )
    return batches


@pytest.fixture(scope="session")
def batches():
    return drawn_batches()


@pytest.fixture(scope="session")
def on_disk():
    """(seed=0, settings of a small model) -> a run; see :class:`OnDisk`."""

    def make(seed=0, **changes):
        return OnDisk(draw_decoder(small_model(**changes), seed))

    return make
