"""A process that dies, or stops for an error of its own, stops the others with a sentence.

Threads here say in plain words what happened, and leave with a code of their own:

- A process that stops for an error leaves its sentence in the coordinator's key-value store, where
  the threads of the others look for it.
- A collective that loses its peer raises in the main thread: :func:`losses_told`.

Where nothing raises, JAX notices the missing heartbeats after ``heartbeat_timeout``, and ends the
process by ``abort``, with its own message and the exit code of a crash.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax

from dynmoe_jax.cluster.rank import EXIT_PEER_LOST
from dynmoe_jax.compat import process_group

_FAILED = "dynmoe_jax/failed"
_POLL_S = 0.5
_GRACE_S = 1.0
"""For an error that all processes have: each may say it by itself."""

_FIRST_LEAVES_LAST_S = 3.0
"""The coordinator lives in process 0.  JAX aborts whoever finds it gone."""

_LOST_CONNECTION = re.compile(
    r"gloo|nccl|rccl|unavailable|closed by peer|connection (reset|refused)|coordination service",
    re.IGNORECASE,
)


class Watch:
    """The threads of one process that look after the others.

    Args:
      too_late: returns what to say if joining takes longer than ``connect_timeout``.
      connect_timeout: seconds.
    """

    def __init__(self, too_late: Callable[[], str], connect_timeout: float):
        self._too_late, self._deadline = too_late, time.monotonic() + connect_timeout
        self._connected, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look, name="cluster watch", daemon=True)
        self._thread.start()

    def connected(self) -> None:
        """Begins to watch: the other processes are there."""
        self._connected.set()
        # Of its own, and never waited for: JAX's client hangs once it has lost the coordinator.
        threading.Thread(target=self._listen, name="cluster ear", daemon=True).start()

    def end(self) -> None:
        """Stops looking: the others may leave."""
        self._ended.set()
        self._connected.set()
        self._thread.join()

    def _look(self) -> None:
        """Waits for the start, and leaves if it does not come in time."""
        if not self._connected.wait(self._deadline - time.monotonic()):
            _leave(self._too_late())

    def _listen(self) -> None:
        """Waits for what another process leaves behind."""
        client = process_group().client
        # Not by a call that blocks until the key is there: the coordinator would remember each.
        while not self._ended.wait(_POLL_S):
            try:
                failure = json.loads(client.key_value_try_get(_FAILED))
            except jax.errors.JaxRuntimeError as error:
                if "NOT_FOUND" in str(error):
                    continue
                if not self._ended.is_set():
                    _leave(_lost("the coordinator in process 0 does not answer"))
                return
            own = failure["process"] == process_group().process_id
            if not own and not self._ended.wait(_GRACE_S):
                _leave(
                    f"Process {failure['process']} on {failure['host']} has stopped: "
                    f"{failure['sentence']}"
                )
            return


@contextlib.contextmanager
def losses_told() -> Iterator[None]:
    """Ends the process with a sentence if work fails because another process is gone."""
    try:
        yield
    except Exception as error:
        reason = _lost_connection(error)
        if process_group().num_processes == 1 or not reason:
            raise
        # The other one may have stopped for a reason that it has left behind.
        time.sleep(_GRACE_S + _POLL_S)
        publish(_lost(reason))
        _leave(_lost(reason))


def _lost_connection(error: BaseException | None) -> str:
    """JAX's words, if an error or what it comes from is that of a lost connection; else empty."""
    while error is not None:
        of_jax = isinstance(error, jax.errors.JaxRuntimeError)
        # jaxlib 0.10 raises a plain ValueError for some of gloo's.
        if (of_jax or type(error) is ValueError) and _LOST_CONNECTION.search(str(error)):
            return str(error).strip().splitlines()[0]
        error = error.__cause__ or error.__context__
    return ""


def publish(sentence: str) -> bool:
    """Tells the other processes why this one stops.

    Returns:
      whether there is anything new in it: False if one of them has said the same before.
    """
    own, client = process_group().process_id, process_group().client
    failure = {"process": own, "host": socket.gethostname(), "sentence": sentence}
    try:
        client.key_value_set(_FAILED, json.dumps(failure))
    except jax.errors.JaxRuntimeError:  # another one was first, or the coordinator is gone
        with contextlib.suppress(jax.errors.JaxRuntimeError, ValueError):
            return json.loads(client.key_value_try_get(_FAILED))["sentence"] != sentence
    return True


def leave(code: int) -> None:
    """Ends this process without waiting for the others, as an ordinary end would."""
    sys.stdout.flush()
    sys.stderr.flush()
    if process_group().process_id == 0:
        time.sleep(_FIRST_LEAVES_LAST_S)
    os._exit(code)


def _leave(sentence: str) -> None:
    # Not by print: the main thread may be in the middle of one.
    number = process_group().process_id
    os.write(2, f"\nerror: process {number} on {socket.gethostname()}: {sentence}\n".encode())
    leave(EXIT_PEER_LOST)


def _lost(reason: str) -> str:
    return (
        f"The connection to the other processes is lost ({reason}): one of them has died, or its "
        "machine, or a second one has come with the same number; the same command on all of them "
        "goes on from the newest checkpoint."
    )
