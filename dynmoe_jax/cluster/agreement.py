"""Agreement between processes: what process 0 decides or collects for all, through JAX's key-value
store.

Not through the devices: these values are text of any length, some come before the first program,
and a process that waits for data to be prepared may wait for hours, which collectives don't.

Every process must make the same calls in the same order, from its main thread.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any

from dynmoe_jax.compat import process_group

_FOREVER_MS = 1000 * 60 * 60 * 24 * 30
"""Whoever would be waited for longer has died, which ends the waiting: see :mod:`.watch`."""

_calls = itertools.count()


def is_first() -> bool:
    """Whether this is process 0; a process by itself is."""
    return process_group().process_id == 0


def has_peers() -> bool:
    """Whether several processes train together."""
    return process_group().num_processes > 1


def broadcast(value: Any) -> Any:
    """Process 0's value, in all processes.

    Args:
      value: JSON-able; that of the other processes is not looked at.
    """
    if not has_peers():
        return value
    client, key = process_group().client, f"dynmoe_jax/broadcast/{next(_calls)}"
    if is_first():
        client.key_value_set(key, json.dumps(value))
    else:
        value = json.loads(client.blocking_key_value_get(key, _FOREVER_MS))
    client.wait_at_barrier(key, _FOREVER_MS)
    if is_first():  # a run of weeks would fill the coordinator's memory
        client.key_value_delete(key)
    return value


def gather(value: Any) -> list[Any] | None:
    """The values of all processes, by their number, in process 0; None in the others.

    Args:
      value: JSON-able.
    """
    if not has_peers():
        return [value]
    client, key = process_group().client, f"dynmoe_jax/gather/{next(_calls)}"
    own = process_group().process_id
    if not is_first():
        client.key_value_set(f"{key}/{own}", json.dumps(value))
        return None
    values = [value]
    for other in range(1, process_group().num_processes):
        values.append(json.loads(client.blocking_key_value_get(f"{key}/{other}", _FOREVER_MS)))
        client.key_value_delete(f"{key}/{other}")
    return values


def on_first(work: Callable[[], Any]) -> Any:
    """Has process 0 do some work while the others wait; returns its result everywhere.

    If the work fails, process 0 raises, and :func:`~dynmoe_jax.cluster.joining.joined` stops the
    others with its sentence.

    Args:
      work: returns something JSON-able.
    """
    return broadcast(work() if is_first() else None)
