"""Joining of processes to a run: by JAX's detection of the cluster, or by explicit flags."""

import contextlib
import socket
import warnings
from collections.abc import Callable, Iterator

import jax

from dynmoe_jax.cluster import watch
from dynmoe_jax.cluster.agreement import has_peers, is_first
from dynmoe_jax.cluster.rank import Rank
from dynmoe_jax.cluster.simulated import provide_threads
from dynmoe_jax.compat import process_group
from dynmoe_jax.console import console
from dynmoe_jax.fields import ConfigError

_LATER_S = 60
"""JAX aborts when its time is up; ours is up first."""

_TOO_LATE_TO_JOIN = "jax.distributed.initialize() must be called before"


@contextlib.contextmanager
def joined(rank: Rank, exits: list[Callable[[int], None]]) -> Iterator[None]:
    """Inside, JAX knows the devices of all processes; only process 0 prints.

    An error in one process ends all of them, each with a sentence.  Outside of any cluster nothing
    happens.

    Args:
      rank: of this process.
      exits: after an error, gets what ends the process with an exit code; the ordinary end of a
        program would wait for the others, which wait for this one.

    Raises:
      ConfigError: there seems to be a cluster, but what JAX finds of it is not enough.
    """
    provide_threads()
    looking = _join(rank)
    if looking is None:
        yield
        return
    console.quiet = not is_first()
    try:
        yield
    except BaseException as error:
        exits.append(watch.leave)
        if watch.publish(_sentence(error)) and not is_first():
            console.quiet = False
            number, host = process_group().process_id, socket.gethostname()
            console.print(f"Process {number} on {host}:", markup=False)
        raise
    finally:
        looking.end()


def _join(rank: Rank) -> watch.Watch | None:
    """Initialises ``jax.distributed``; None where there are no others."""
    if rank.is_alone:
        return None
    explicit = rank.coordinator is not None
    looking = watch.Watch(lambda: _too_late(rank), rank.connect_timeout)
    try:
        with warnings.catch_warnings():
            # In a container, JAX asks for a package that only a Kubernetes job would need.
            warnings.filterwarnings("ignore", message="Kubernetes environment detected")
            jax.distributed.initialize(
                rank.coordinator,
                rank.num_processes,
                rank.process_id,
                rank.local_id,
                cluster_detection_method="deactivate" if explicit else None,
                initialization_timeout=rank.connect_timeout + _LATER_S,
                heartbeat_timeout_seconds=rank.heartbeat_timeout,
            )
        if has_peers():
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.devices()  # in all processes at once: they tell each other what they have
    except Exception as error:
        looking.end()
        # No cluster; or whoever calls has computed before, which in a cluster would be too soon.
        if not explicit and str(error).startswith(("coordinator_address", _TOO_LATE_TO_JOIN)):
            return None
        raise ConfigError(
            f"The other processes cannot be found ({' '.join(str(error).split())}); give "
            "--coordinator, --num_processes and --process_id, or --num_processes=1 for a process "
            "by itself."
        ) from error
    if not has_peers():
        looking.end()
        return None
    looking.connected()
    return looking


def _too_late(rank: Rank) -> str:
    within = f"within --connect_timeout={rank.connect_timeout} seconds"
    if rank.process_id == 0:
        return (
            f"Not all of the {rank.num_processes} processes have come {within}; check that each "
            f"was started with --coordinator={rank.coordinator} and a --process_id of its own."
        )
    if rank.coordinator is None:
        found = process_group().coordinator_address
        return (
            f"The other processes of the cluster around this one were not reached at {found} "
            f"{within}; check that all were started, and that this port is open between the "
            "machines; else give --coordinator, --num_processes and --process_id, or "
            "--num_processes=1 for a process by itself."
        )
    return (
        f"Process 0 and the others were not reached at --coordinator={rank.coordinator} {within}; "
        "check that all were started, that the address is that of process 0, that its port is open "
        "between the machines, and that no two have the same number."
    )


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted."
    return " ".join(str(error).split()) or type(error).__name__
