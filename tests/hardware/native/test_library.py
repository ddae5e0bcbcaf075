"""The kernels are compiled once, and where they cannot be, something else computes and says so."""

import ctypes
import stat

import jax
import jax.numpy as jnp
import pytest

from dynmoe_jax import config
from dynmoe_jax.experts.kernels import choice as product_choice
from dynmoe_jax.hardware.native import library
from dynmoe_jax.hardware.target import Target
from dynmoe_jax.model.kernels.attention.choice import choose_attention

CPU = Target("cpu", "cpu")
NO_KERNELS = library.why_not()
needs_kernels = pytest.mark.skipif(bool(NO_KERNELS), reason=NO_KERNELS)


def compiler(folder, body):
    """A program that stands in for a compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="ascii")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_kernels
@pytest.mark.slow
def test_it_is_compiled_once_for_a_machine(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-O0"))  # done in a third of the time
    path = library._compiled()
    assert list((tmp_path / "dynmoe_jax").iterdir()) == [path]
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled a second time"))
    assert library._compiled() == path
    assert all(hasattr(ctypes.CDLL(str(path)), name) for name in library.HANDLERS)


def test_another_machine_gets_another_library(fresh, monkeypatch, tmp_path):
    # The compiler's macros name the instructions of the machine that it runs on.
    made = []
    monkeypatch.setattr(library, "_compile", lambda _, path: made.append(path.name))
    monkeypatch.setenv("CXX", compiler(tmp_path, 'echo "#define __AVX2__ 1"'))
    library._compiled()
    library._compiled()
    monkeypatch.setenv("CXX", compiler(tmp_path, 'echo "#define __AVX512F__ 1"'))
    library._compiled()
    assert made[0] == made[1] != made[2]


def test_without_a_compiler(fresh, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert fresh.why_not() == "there is no C++ compiler; install GCC or Clang"


def test_a_compiler_that_is_not_there(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    assert "nothing does not run (No such file or directory)" in fresh.why_not()


def test_a_library_that_cannot_be_loaded(fresh, monkeypatch, tmp_path):
    # One that was damaged, say; CXX may have arguments, as where a cache goes before the compiler.
    monkeypatch.setenv("CXX", f"env {compiler(tmp_path, 'echo')}")
    monkeypatch.setattr(library, "_compile", lambda _, path: path.write_text("damaged"))
    assert "cannot be loaded" in fresh.why_not()
    assert fresh.why_not().endswith("; delete it")


def test_a_compiler_that_fails(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv(
        "CXX", compiler(tmp_path, "echo 'error: unrecognized option -std=c++20' >&2; exit 1")
    )
    why = fresh.why_not()
    assert "does not compile them (error: unrecognized option -std=c++20)" in why
    assert "\n" not in why


def test_a_cache_folder_that_cannot_be_made(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("CXX", "true")
    assert "set XDG_CACHE_HOME to a folder" in fresh.why_not()


def test_what_computes_instead_and_the_warning(fresh, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    product_choice.available_for.cache_clear()
    available = product_choice.available_for("cpu")
    product_choice.available_for.cache_clear()
    choice = product_choice.choose_products("auto", CPU, available, jnp.float32, 8, 8)
    assert choice == "blocks"
    assert choose_attention("auto", CPU, jnp.float32, 8, 8, 1, 1) == "tiled"
    said = capsys.readouterr().out
    assert said.count("warning:") == 1
    assert "/nowhere/c++ does not run" in said


def ask_for_experts():
    product_choice.check_request("native", CPU, frozenset())


def ask_for_attention():
    choose_attention("native", CPU, jnp.float32, 8, 8, 1, 1)


@pytest.mark.parametrize("ask", [ask_for_experts, ask_for_attention])
def test_what_is_asked_for_by_name_is_refused(fresh, monkeypatch, ask):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(config.ConfigError, match="/nowhere/c\\+\\+ does not run") as caught:
        ask()
    assert "\n" not in str(caught.value)
    assert "'auto'" in str(caught.value)


@needs_kernels
def test_kernels_refuse_memory_of_another_size():
    library.load()
    T, R, E, D, F = 2, 3, 2, 4, 4
    shapes = [(T, D), (1, 2 * F), (D, R)]
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    call = jax.ffi.ffi_call("dynmoe_experts", results)
    numbers = jnp.zeros(R, jnp.int32), jnp.zeros(R), jnp.zeros(E, jnp.int32)
    stack = jnp.zeros((1, E, D, 2 * F)), jnp.zeros((1, E, F, D)), jnp.int32(0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="another number of columns"):
        call(jnp.zeros((T, D)), *numbers, *stack)
