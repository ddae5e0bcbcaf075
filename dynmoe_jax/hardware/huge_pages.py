"""Memory in pages of 2 MB for large arrays, where a program computes on the CPU.

A step of training takes gigabytes for a moment and gives them back.  In pages of 4 kB the kernel
is asked for each of them, every time (docs/measurements.md: cpu-huge-pages).  The C library of
Linux can ask for larger pages, but only learns so from its environment when a program starts.

So it learns there, too, to keep few heaps ("arenas").  It would give 8 for each core to whatever
threads come along, and saving starts new ones each time: over the first saves of a run, each
heap grew until it had once held what a save needs.  With two, memory stays as it is after the first
saves (docs/reliability.md), and a step takes no longer (docs/measurements.md: cpu-two-heaps).

A program that streams a model through memory, and computes little, asks for more: that every array
goes back to the system when it is freed.  By itself the C library learns from the first large array
that is freed to keep those up to 32 MB (docs/measurements.md: surgery-memory).
"""

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"
ARENAS = "glibc.malloc.arena_max"
OWN_MAPPING, KEPT_FREE = "glibc.malloc.mmap_threshold", "glibc.malloc.trim_threshold"
FEW_BYTES = 128 * 1024
ON_REQUEST = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment_for_huge_pages(
    environment: Mapping[str, str], *, keep_little: bool = False
) -> dict[str, str] | None:
    """Environment in which large arrays lie in huge pages, and heaps are few.

    Args:
      environment: that of this process.
      keep_little: whether memory that is freed goes back to the system at once.

    Returns:
      None where there is nothing to gain: JAX is told to use no CPU, huge pages are decided on
      already (by the user, or by the kernel: for all or for none), or the C library is not
      glibc >= 2.35.
    """
    tunables = environment.get(TUNABLES, "")
    if HUGE_PAGES in tunables or environment.get("JAX_PLATFORMS", "") not in ("", "cpu"):
        return None
    if not ON_REQUEST.is_file() or "[madvise]" not in ON_REQUEST.read_text(encoding="ascii"):
        return None
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
        return None
    asked = [tunables] if tunables else []
    asked.append(f"{HUGE_PAGES}=1")
    wanted = {ARENAS: 2}
    if keep_little:
        wanted |= {OWN_MAPPING: FEW_BYTES, KEPT_FREE: FEW_BYTES}
    asked += [f"{name}={value}" for name, value in wanted.items() if name not in tunables]
    return dict(environment) | {TUNABLES: ":".join(asked)}


def restart_with_huge_pages(*, keep_little: bool = False) -> None:
    """Starts this program again, at once and as the same process, if that gains huge pages.

    Call it before anything costly is imported.  `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` keeps it
    from doing so.

    Args:
      keep_little: whether memory that is freed goes back to the system at once.
    """
    environment = environment_for_huge_pages(os.environ, keep_little=keep_little)
    if environment is not None and sys.orig_argv:
        os.execvpe(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
