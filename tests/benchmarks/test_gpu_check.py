"""The check of kernels on a GPU, in interpret mode."""

import jax.numpy as jnp
import pytest

from benchmarks import gpu_check


@pytest.mark.long
def test_kernels_agree_with_their_twins():
    cases = [*gpu_check.expert_cases(256, True), *gpu_check.attention_cases(256, True)]
    assert len(cases) == 11
    for name, actual, wanted in cases:
        assert gpu_check.error(actual, wanted) <= gpu_check.MOST, name


@pytest.mark.parametrize("wrong", [2.0, jnp.nan])
def test_what_is_wrong_is_too_large(wrong):
    assert gpu_check.error(jnp.full(4, wrong), jnp.ones(4)) > gpu_check.MOST


def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.main([])
    assert stop.value.code == 2
    assert "need an NVIDIA GPU, and JAX sees none" in capsys.readouterr().err
