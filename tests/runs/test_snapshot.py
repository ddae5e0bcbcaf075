"""The copy that is saved: it keeps its memory, and shares none with the state."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dynmoe_jax import config
from dynmoe_jax.mesh.make_mesh import make_mesh
from dynmoe_jax.runs.saving.snapshot import Snapshot


def addresses(tree):
    return {
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
    }


def test_copies_go_to_the_same_memory_and_none_of_the_states():
    mesh = make_mesh(config.Mesh(), batch_size=8)
    assert mesh.size == 8
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    state = {
        "matrix": jax.device_put(jnp.arange(32.0).reshape(8, 4), split),
        "vector": jax.device_put(jnp.arange(5.0), whole),
        "count": jax.device_put(jnp.int32(3), whole),
    }
    snapshot = Snapshot()
    first = addresses(snapshot.of(state))
    assert not first & addresses(state)
    state = jax.tree.map(lambda x: x + 1, state)
    copy = snapshot.of(state)
    assert addresses(copy) == first
    jax.tree.map(np.testing.assert_array_equal, copy, state)
    assert jax.tree.map(lambda x: x.sharding, copy) == jax.tree.map(lambda x: x.sharding, state)


def test_a_state_that_has_grown_is_copied_without_a_word():
    snapshot = Snapshot()
    snapshot.of({"matrix": jnp.zeros((2, 3))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX warns of memory that it was given for nothing
        copy = snapshot.of({"matrix": jnp.ones((4, 5))})
    np.testing.assert_array_equal(copy["matrix"], np.ones((4, 5)))
