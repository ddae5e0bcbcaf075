"""Combine (unpermute): the sum of the rows of each token.

Axis legend: T tokens, K slots per token, n rows that follow each other, D model width.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def add_up(
    y_nD: Float[Array, "n D"],
    token_n: Int[Array, "n"],
    used_n1: Bool[Array, "n 1"],
    start: int,
    row_TK: Int[Array, "T K"] | None,
    tokens: int,
) -> Float[Array, "T D"]:
    """Segment sum of rows into tokens, for the rows in ``y_nD``, float32.

    Where it is known which rows a token has, they are gathered, slot by slot: a scatter with equal
    indices sorts them on TPU first, which takes longer and much longer to compile
    (docs/measurements.md: v5p-scatter-cycles, v5p-scatter-compile), and adds in no fixed order on
    GPU.

    Args:
      y_nD: rows, padding may hold anything.
      token_n: their tokens.
      used_n1: False for padding.
      start: the number of the first of these rows among all.
      row_TK: numbers of the rows of each token; those that are not among these count nothing.
      tokens: T.
    """
    y_TD = jnp.zeros((tokens, y_nD.shape[-1]), jnp.float32)
    if row_TK is None:
        # Padding goes behind the last token: nowhere.
        place_n = jnp.where(used_n1[:, 0], token_n, tokens)
        return y_TD.at[place_n].add(y_nD.astype(jnp.float32), mode="drop")
    # Not n: where rows were filled up to a multiple, "no row" is the number of a padding row.
    used = jnp.sum(used_n1)
    for slot in range(row_TK.shape[1]):
        here_T = row_TK[:, slot] - start
        inside_T1 = ((here_T >= 0) & (here_T < used))[:, None]
        y_TD += jnp.where(inside_T1, y_nD.at[here_T].get(mode="clip").astype(jnp.float32), 0)
    return y_TD
