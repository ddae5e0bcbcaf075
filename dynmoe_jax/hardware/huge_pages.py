"""Memory in pages of 2 MB for large arrays, where a program computes on the CPU.

A step of training takes gigabytes for a moment and gives them back.  In pages of 4 kB the kernel
is asked for each of them, every time (docs/measurements.md: cpu-huge-pages).  The C library of
Linux can ask for larger pages, but only learns so from its environment when a program starts.

So it learns there, too, to keep few heaps ("arenas").  It would give 8 for each core to whatever
threads come along, and saving starts new ones each time: over the first saves of a run, each
heap grew until it had once held what a save needs.  With two, memory stays as it is after the first
saves (docs/reliability.md), and a step takes no longer (docs/measurements.md: cpu-two-heaps).
"""

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"
ARENAS = "glibc.malloc.arena_max"
ON_REQUEST = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment_for_huge_pages(environment: Mapping[str, str]) -> dict[str, str] | None:
    """Environment in which large arrays lie in huge pages, and heaps are few.

    Args:
      environment: that of this process.

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
    if ARENAS not in tunables:
        asked.append(f"{ARENAS}=2")
    return dict(environment) | {TUNABLES: ":".join(asked)}


def restart_with_huge_pages() -> None:
    """Starts this program again, at once and as the same process, if that gains huge pages.

    Call it before anything costly is imported.  `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` keeps it
    from doing so.
    """
    environment = environment_for_huge_pages(os.environ)
    if environment is not None and sys.orig_argv:
        os.execvpe(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
