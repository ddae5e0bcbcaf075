"""Options of the compiler: none where nothing knows them, and no run fails for want of them."""

from dynmoe_jax.target import Target
from dynmoe_jax.training.compilation import compiler_options


def test_only_a_tpu_gets_options():
    assert compiler_options(Target("cpu")) == {}
    assert compiler_options(Target("gpu", "NVIDIA H100 80GB HBM3", 9.0)) == {}


def test_a_compiler_that_does_not_know_them_gets_none(capsys):
    # The compiler at hand is one for CPU.
    assert compiler_options(Target("tpu", "of another version")) == {}
    assert "XLA compiles without the options" in capsys.readouterr().out.replace("\n", " ")
