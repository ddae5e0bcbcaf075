"""Huge pages: asked for where they help, once, by a program that starts again."""

import os
import subprocess
import sys

import pytest

from dynmoe_jax.hardware import huge_pages


@pytest.fixture(autouse=True)
def on_request(monkeypatch, tmp_path):
    """A kernel that gives huge pages on request, and a C library that can ask for them."""
    pages = tmp_path / "enabled"
    pages.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "ON_REQUEST", pages)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    return pages


def asked(**environment):
    """What would be set, or None."""
    return huge_pages.environment_for_huge_pages(environment)


def test_asks_for_huge_pages_and_keeps_the_rest():
    tunables = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=2"
    assert asked(HOME="/root") == {"HOME": "/root", "GLIBC_TUNABLES": tunables}


def test_other_tunables_stay():
    found = asked(GLIBC_TUNABLES="glibc.malloc.arena_max=7")
    assert found["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=7:glibc.malloc.hugetlb=1"


def test_keeps_little_where_that_is_asked_for_and_the_user_has_not_decided():
    found = huge_pages.environment_for_huge_pages(
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=7"}, keep_little=True
    )
    assert set(found["GLIBC_TUNABLES"].split(":")) == {
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.arena_max=2",
        "glibc.malloc.mmap_threshold=131072",
        "glibc.malloc.trim_threshold=7",
    }


def test_does_not_ask_twice_nor_against_the_user():
    assert asked(**asked()) is None
    assert asked(GLIBC_TUNABLES="glibc.malloc.hugetlb=0") is None


def test_does_not_ask_where_no_cpu_computes():
    assert asked(JAX_PLATFORMS="tpu") is None
    assert asked(JAX_PLATFORMS="cpu") is not None


@pytest.mark.parametrize("mode", ["[always] madvise never", "always madvise [never]"])
def test_leaves_it_to_a_kernel_that_has_decided(on_request, mode):
    on_request.write_text(mode)
    assert asked() is None


@pytest.mark.parametrize("library", [("glibc", "2.31"), ("", "")])
def test_needs_a_c_library_that_knows_the_setting(monkeypatch, library):
    monkeypatch.setattr("platform.libc_ver", lambda: library)
    assert asked() is None


def test_restarts_once_with_the_same_arguments(on_request):
    program = (
        "import os, pathlib, sys; from dynmoe_jax.hardware import huge_pages; "
        f"huge_pages.ON_REQUEST = pathlib.Path({str(on_request)!r}); "
        "huge_pages.platform.libc_ver = lambda: ('glibc', '2.36'); "
        "print('started', os.getpid(), flush=True); huge_pages.restart_with_huge_pages(); "
        "print('goes on', os.environ['GLIBC_TUNABLES'], sys.argv[1:])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-c", program, "--workdir=a b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, second, last = done.stdout.splitlines()
    assert first == second  # the same process: whoever waits for it or signals it need not know
    assert last == "goes on glibc.malloc.hugetlb=1:glibc.malloc.arena_max=2 ['--workdir=a b']"
