"""What breaks without each private part of another library that the package uses."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from dynmoe_jax import compat
from dynmoe_jax.cluster import agreement


def test_process_group_tells_a_process_by_itself_before_jax_looks_for_devices():
    """Without it every process would print, save and prepare data, each for itself."""
    group = compat.process_group()
    assert (group.process_id, group.num_processes) == (0, 1)
    assert agreement.is_first()
    assert not agreement.has_peers()


def test_handlers_share_the_store_of_write_shapes():
    """Without it arrays that a paced handler saved have no write shape in the metadata."""
    usual = ocp.type_handlers.get_type_handler(jax.Array)
    store = compat.array_metadata_store(usual)
    assert store is not None
    handler = ocp.type_handlers.ArrayHandler(array_metadata_store=store)
    assert compat.array_metadata_store(handler) is store


def test_slices_are_written_by_the_handler_that_knows_them(tmp_path):
    """Without it a streamed array would have to exist as a whole to be saved."""

    class Made:
        shape, dtype = (3, 2), np.dtype(np.float32)
        size = 6

    written = []

    class Handler(compat.SlicewiseHandler):
        def typestr(self):
            return "made"

        async def write_array(self, value, tspec, ts_context):
            array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            for index in range(value.shape[0]):
                written.append(index)
                await array[index].write(np.full(2, index, np.float32))

    registry = ocp.type_handlers.create_type_handler_registry((Made, Handler()))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "saved", ocp.args.PyTreeSave({"made": Made()}))
    assert written == [0, 1, 2]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(
            tmp_path / "saved",
            ocp.args.PyTreeRestore(
                restore_args={"made": ocp.RestoreArgs(restore_type=np.ndarray)},
                item={"made": ocp.utils.to_shape_dtype_struct(np.zeros((3, 2), np.float32))},
            ),
        )
    np.testing.assert_array_equal(restored["made"], [[0, 0], [1, 1], [2, 2]])


@pytest.mark.parametrize("name", ["key_value_set", "key_value_try_get", "wait_at_barrier"])
def test_the_coordinators_client_has_what_is_called(name):
    """Without them processes could agree on nothing before the first program."""
    from jax._src.lib import _jax

    assert hasattr(_jax.DistributedRuntimeClient, name)
