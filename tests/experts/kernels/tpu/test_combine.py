"""The kernel that adds up rows by token, in interpret mode, against gathers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.experts.kernels.combine import add_up
from dynmoe_jax.experts.kernels.tpu.combine import Sizes, sizes_for, sum_of_rows
from dynmoe_jax.experts.rows import Slots, rows_from_slots
from dynmoe_jax.hardware.vmem import COMBINE_BUDGET

T, D = 512, 128
SIZES = Sizes(block=64, together=4, ring=3)


def draw(experts, slots, chosen=0.4, seed=0, bound=None):
    """Rows of T tokens, each with up to ``slots`` of the experts, and NaN in padding."""
    rng = np.random.default_rng(seed)
    expert_TK = np.argsort(rng.random((T, experts)), axis=1)[:, :slots]
    used_TK = np.arange(slots) < rng.binomial(slots, chosen, (T, 1))
    expert_TK = jnp.array(np.where(used_TK, expert_TK, experts))
    rows = rows_from_slots(Slots(expert_TK, jnp.ones((T, slots)), experts), bound or T * slots)
    y_nD = jnp.array(rng.normal(size=(rows.token_R.shape[0], D)), jnp.float32)
    return rows, jnp.where(rows.used_R[:, None], y_nD, jnp.nan)


def gathered(rows, y_nD):
    return add_up(y_nD, rows.token_R, rows.used_R[:, None], 0, rows.row_TK, T)


@pytest.mark.parametrize(
    ("experts", "slots", "chosen"),
    [
        (4, 3, 0.5),
        pytest.param(20, 7, 0.25, marks=pytest.mark.long),
        pytest.param(4, 4, 1.0, marks=pytest.mark.long),
        (4, 2, 0.01),
    ],
)
def test_sums_equal_gathers(experts, slots, chosen):
    rows, y_nD = draw(experts, slots, chosen)
    run = jax.jit(lambda *args: sum_of_rows(*args, SIZES, interpret=True))
    y_TD = run(y_nD, rows.token_R, rows.group_size_E, rows.row_TK)
    np.testing.assert_allclose(y_TD, gathered(rows, y_nD), rtol=1e-5, atol=1e-5)


def test_a_block_without_rows_and_an_expert_without_rows_are_zero():
    expert_TK = np.full((T, 2), 4)
    expert_TK[300:310, 0], expert_TK[305:, 1] = 3, 1
    rows = rows_from_slots(Slots(jnp.array(expert_TK), jnp.ones((T, 2)), 4), 1024)
    y_nD = jnp.where(rows.used_R[:, None], jnp.ones((1024, D)), jnp.nan)
    y_TD = sum_of_rows(y_nD, rows.token_R, rows.group_size_E, rows.row_TK, SIZES, interpret=True)
    assert np.all(np.asarray(y_TD) == np.sum(expert_TK < 4, axis=1, keepdims=True))


def test_bfloat16_is_added_up_in_float32():
    rows, y_nD = draw(8, 5, 0.6)
    y_nD = y_nD.astype(jnp.bfloat16)
    y_TD = sum_of_rows(y_nD, rows.token_R, rows.group_size_E, rows.row_TK, SIZES, interpret=True)
    assert y_TD.dtype == jnp.bfloat16
    wanted = gathered(rows, y_nD).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(y_TD, np.float32), np.asarray(wanted, np.float32))


def test_some_rows_that_follow_each_other():
    # A part of the rows begins within an expert.
    rows, y_nD = draw(6, 4, 0.5)
    start, size = 208, 320
    end_E = jnp.cumsum(rows.group_size_E)
    first_E, last_E = (
        jnp.clip(at_E, start, start + size) for at_E in (end_E - rows.group_size_E, end_E)
    )
    part = slice(start, start + size)
    y_TD = sum_of_rows(
        y_nD[part],
        rows.token_R[part],
        last_E - first_E,
        rows.row_TK - start,
        Sizes(block=128, together=1, ring=2),
        interpret=True,
    )
    used_n1 = rows.used_R[part, None]
    wanted = add_up(y_nD[part], rows.token_R[part], used_n1, start, rows.row_TK, T)
    np.testing.assert_allclose(y_TD, wanted, rtol=1e-5, atol=1e-5)


def test_sizes_fit_and_divide():
    # At D = 1024 sums of 8 x 256 tokens would be, twice, 8.4 million bytes, numbers of their rows
    # 2.1, tiles on their way 2.1, and a block in float32 1.0: more than 12.6.
    assert sizes_for(8192, 1024, 2) == Sizes(256, 4, 8)
    assert sizes_for(8192, 4096, 2) == Sizes(256, 1, 2)
    assert sizes_for(3 * 256, 1024, 2) == Sizes(256, 1, 8)
    for width in (128, 2048, 6144):
        sizes = sizes_for(8192, width, 2)
        assert 2 * sizes.together * sizes.block * width * 2 < COMBINE_BUDGET
    assert sizes_for(8192, 2**15, 2) is None
    assert sizes_for(500, 1024, 2) is None
    assert sizes_for(512, 100, 2) is None
