"""How rows are cut into blocks: every row once, at the least cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.experts.kernels.cpu.block_schedule import (
    OVERHEAD_ROWS,
    SIZES,
    Schedule,
    block_sizes,
    cheapest_cut,
)


def test_sizes_follow_the_number_of_tokens():
    assert block_sizes(1) == (1,)
    assert block_sizes(9) == (1, 2, 4, 8, 16)
    assert block_sizes(33) == (8, 16, 32, 64)
    assert block_sizes(300) == (8, 16, 32, 64, 128, 192, 256, 384)
    assert block_sizes(4096) == (32, 64, 128, 192, 256, 384, 512, 768, 1024)
    assert block_sizes(10**9) == SIZES[-1:]


def test_cuts_by_hand():
    cuts = cheapest_cut((32, 64, 128, 256, 512))
    assert cuts[0].tolist() == [0, 0, 0, 0, 0]
    assert cuts[30].tolist() == [1, 0, 0, 0, 0]
    # 256 wastes 116 rows; 128 + 32 wastes 20 and costs one more block, of 48 rows' worth.
    assert cuts[140].tolist() == [1, 0, 1, 0, 0]
    # 512 wastes 12 rows; 256 + 128 + 64 + 32 + ... would need three more blocks.
    assert cuts[500].tolist() == [0, 0, 0, 0, 1]


def test_no_cut_of_two_sizes_is_cheaper():
    sizes = (32, 64, 128, 256)
    cost = cheapest_cut(sizes) @ (np.array(sizes) + OVERHEAD_ROWS)
    for rows in range(1, 256):
        assert cost[rows] <= min(s + OVERHEAD_ROWS for s in sizes if s >= rows)
        pairs = [a + b + 2 * OVERHEAD_ROWS for a in sizes for b in sizes if a + b >= rows]
        assert cost[rows] <= min(pairs)


@pytest.mark.parametrize("loads", [[0, 1, 8, 23], [40, 0, 0, 0], [0, 0, 0, 0], [37, 33, 40, 39]])
def test_every_row_is_visited_once_and_in_order(loads):
    rows, tokens = 160, 40
    token_R = jnp.arange(rows, dtype=jnp.int32)
    schedule = Schedule(token_R, jnp.ones(rows), jnp.array(loads), tokens)

    def add_block(carry, e, start, token_b, weight_b):
        visits_R, expert_R, last = carry
        visits_R = visits_R.at[token_b].add(weight_b, mode="drop")
        expert_R = expert_R.at[token_b].set(e, mode="drop")
        return visits_R, expert_R, jnp.where(start > last, start, jnp.iinfo(jnp.int32).max)

    carry = (jnp.zeros(rows), jnp.full(rows, -1), jnp.int32(-1))
    visits_R, expert_R, last = jax.jit(lambda: schedule.fold(add_block, carry))()
    used = sum(loads)
    assert visits_R.tolist() == [1.0] * used + [0.0] * (rows - used)
    assert expert_R[:used].tolist() == np.repeat(np.arange(4), loads).tolist()
    assert last < rows
