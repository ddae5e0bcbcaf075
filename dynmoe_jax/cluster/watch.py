"""A process that dies, or stops for an error of its own, stops the others with a sentence.

JAX notices the death of a process by its missing heartbeats, and ends the others by ``abort``, with
a stack trace and the exit code of a crash.  Threads here say in plain words what happened,
and leave with a code of their own:

- A process that stops for an error leaves its sentence in the coordinator's key-value store, where
  the threads of the others look for it.
- A collective that loses its peer raises in the main thread: :func:`losses_told`.
- Where nothing raises, JAX aborts after ``heartbeat_timeout``.  The abort is held up for some
  seconds, in which a thread finds it and speaks.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax._src import distributed

from dynmoe_jax.cluster.place import EXIT_PEER_LOST

_FAILED = "dynmoe_jax/failed"
_THREADS = Path("/proc/self/task")
_POLL_S = 0.5
_ABORT_DELAY_S = int(signal.SIGABRT)
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
        """From now on the other processes are there."""
        _hold_up_aborts()
        self._connected.set()
        # Of its own, and never waited for: JAX's client hangs once it has lost the coordinator.
        threading.Thread(target=self._listen, name="cluster ear", daemon=True).start()

    def end(self) -> None:
        """Stops looking: the others may leave."""
        self._ended.set()
        self._connected.set()
        self._thread.join()

    def _look(self) -> None:
        """Waits for the start, then for an abort."""
        if not self._connected.wait(self._deadline - time.monotonic()):
            _leave(self._too_late())
        while not self._ended.wait(_POLL_S):
            if not _aborting():
                continue
            if not _answers():
                _leave(_lost("JAX's reason stands above"))
            # A crash of this process alone, which JAX explains itself.
            publish("it crashed; its own output says why.")
            return

    def _listen(self) -> None:
        """Waits for what another process leaves behind."""
        client = distributed.global_state.client
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
            own = failure["process"] == distributed.global_state.process_id
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
        if distributed.global_state.num_processes == 1 or not reason:
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
    own, client = distributed.global_state.process_id, distributed.global_state.client
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
    if distributed.global_state.process_id == 0 and not _aborting():
        time.sleep(_FIRST_LEAVES_LAST_S)
    os._exit(code)


def _leave(sentence: str) -> None:
    # Not by print: the main thread may be in the middle of one.
    number = distributed.global_state.process_id
    os.write(2, f"\nerror: process {number} on {socket.gethostname()}: {sentence}\n".encode())
    leave(EXIT_PEER_LOST)


def _lost(reason: str) -> str:
    return (
        f"The connection to the other processes is lost ({reason}): one of them has died, or its "
        "machine, or a second one has come with the same number; the same command on all of them "
        "goes on from the newest checkpoint."
    )


def _answers() -> bool:
    """Whether JAX's client still works; it hangs once it has noticed that another is gone."""
    answered = threading.Event()

    def ask():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            distributed.global_state.client.get_live_nodes([distributed.global_state.process_id])
            answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(1.5)


def _hold_up_aborts() -> None:
    """Makes ``abort`` wait for ``_ABORT_DELAY_S`` seconds before it ends the process.

    The handler of SIGABRT becomes the C library's ``sleep``, which gets the signal's number, 6, for
    its seconds.  No Python runs in it: the thread that aborts may hold any lock.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), None
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def _aborting() -> bool:
    """Whether a thread is in the handler of SIGABRT: there, and only there, the signal is blocked
    while others are not.  Linux alone tells; elsewhere JAX's abort has the last word."""
    abort_only = 1 << (signal.SIGABRT - 1)
    for thread in _THREADS.glob("*/status"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found = re.search(r"^SigBlk:\s*([0-9a-f]+)", thread.read_text(), re.MULTILINE)
            if found and int(found[1], 16) == abort_only:
                return True
    return False
