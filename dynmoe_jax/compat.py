"""Private parts of JAX and Orbax that no public one replaces, each in one place.

``tests/test_compat.py`` says of each what breaks without it.
"""

from typing import Any

import orbax.checkpoint as ocp
from jax._src import distributed


def process_group() -> distributed.State:
    """The processes that JAX has joined: own number, their count, and the coordinator's client.

    JAX (0.12) has no public way to the coordinator's key-value store.
    """
    return distributed.global_state


def array_metadata_store(handler: ocp.type_handlers.ArrayHandler) -> Any:
    """The store of the write shapes of arrays, which a handler made beside Orbax's own must share.

    Orbax (0.12) gives its default one no public name.
    """
    return handler._array_metadata_store


class SlicewiseHandler(ocp.type_handlers.NumpyHandler):
    """A handler that opens and writes each array by its ``write_array(value, tspec, ts_context)``.

    Orbax (0.12) has no public hook between making the description of an array and writing it.
    """

    async def _open_and_write(self, value, tspec, ts_context):
        await self.write_array(value, tspec, ts_context)
