"""Fits of nets of two layers to matrices (D2DMoE, arXiv 2310.04361, step 2).

Axis legend: S sampled tokens, I inputs of a matrix side by side, O its outputs side by side, U
hidden units of a net, R rank, P steps, B tokens of a step.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from dynmoe_jax.surgery.experts.descent import descended
from dynmoe_jax.surgery.experts.split_models import kept_and_learned, order_of_steps

Net = tuple[Array, Array, Array, Array]
"""Both layers of a net, each a matrix and a bias: [I, U], [U], [U, O], [O]."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """A net that was fitted to a matrix.

    Attributes:
      net: its parameters.
      error: squared error of samples that nothing was learned from, as a share of the outputs'
        variance.
      linear_error: the same of the best linear map through as many units.
    """

    net: Net
    error: float
    linear_error: float


def fit_net(
    matrix_IO: Float[np.ndarray, "I O"],
    input_SI: Float[np.ndarray, "S I"],
    units: int,
    schedule: tuple[int, int, float],
    random: np.random.Generator,
) -> Fit:
    """Fits a net to a matrix, on three quarters of the samples; the one that it begins with stays
    where that is nearer, as with room enough to be exact.

    Args:
      matrix_IO: what it is to compute.
      input_SI: sampled inputs.
      units: U of the net.
      schedule: (times that each sample is learned from, samples of a step, learning rate).
      random: numbers that samples are divided and ordered by.
    """
    epochs, batch_size, rate = schedule
    kept_SI, learned_SI = (input_SI[rows] for rows in kept_and_learned(len(input_SI), random))
    order_PB = order_of_steps(len(learned_SI), batch_size, epochs, random)
    mean_O, basis_OR = best_directions(learned_SI @ matrix_IO, units)
    first = first_net(matrix_IO, mean_O, basis_OR, units)
    fit = jax.device_get(_descended(rate, first, matrix_IO, learned_SI, order_PB))

    def learned_error(net: Net) -> float:
        return _error(net_output(net, learned_SI), learned_SI @ matrix_IO)

    net = min(first, fit, key=learned_error)
    output_SO = kept_SI @ matrix_IO
    linear_SO = mean_O + (output_SO - mean_O) @ basis_OR @ basis_OR.T
    errors = (_error(each_SO, output_SO) for each_SO in (net_output(net, kept_SI), linear_SO))
    return Fit(net, *errors)


def best_directions(
    output_SO: Float[np.ndarray, "S O"], rank: int
) -> tuple[Float[np.ndarray, "O"], Float[np.ndarray, "O R"]]:
    """(mean of outputs, the directions in which they differ most from it).

    ``mean + (y - mean) basis basis^T`` is the linear map of that rank with the least squared error
    (reduced-rank regression).
    """
    mean_O = output_SO.mean(axis=0)
    centered_SO = (output_SO - mean_O).astype(np.float64)
    _, vectors_OO = np.linalg.eigh(centered_SO.T @ centered_SO)
    return mean_O, vectors_OO[:, ::-1][:, :rank].astype(np.float32)


def first_net(
    matrix_IO: Float[np.ndarray, "I O"],
    mean_O: Float[np.ndarray, "O"],
    basis_OR: Float[np.ndarray, "O R"],
    units: int,
) -> Net:
    """A net that computes the best linear map through half as many units.

    Two units stand for each direction, one of which is on: ``relu(z) - relu(-z) = z``.  Where there
    are more units than that, the others are on for what is left, and give nothing at first.
    """
    half = min(units // 2, basis_OR.shape[1])
    signs = np.resize([1.0, -1.0], units)
    order = np.arange(units) // 2 % max(half, 1)
    live = np.arange(units) < 2 * half
    first_IU = matrix_IO @ basis_OR[:, order] * signs
    bias_U = -(mean_O @ basis_OR[:, order]) * signs
    last_UO = (basis_OR[:, order] * (signs * live)).T
    return tuple(np.asarray(x, np.float32) for x in (first_IU, bias_U, last_UO, mean_O))


def net_output(net: Net, x_SI: Float[Array, "S I"]) -> Float[Array, "S O"]:
    """Output of a net."""
    first_IU, first_bias_U, last_UO, last_bias_O = net
    return jax.nn.relu(x_SI @ first_IU + first_bias_U) @ last_UO + last_bias_O


def _error(found_SO: np.ndarray, wanted_SO: np.ndarray) -> float:
    """Squared error as a share of the variance of what is wanted."""
    spread = np.square(wanted_SO - wanted_SO.mean(axis=0)).sum(dtype=np.float64)
    return float(np.square(found_SO - wanted_SO).sum(dtype=np.float64) / max(spread, 1e-30))


@partial(jax.jit, static_argnums=0)
def _descended(rate, net, matrix_IO, input_SI, order_PB):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, order_PB.shape[0]))
    target_SO = input_SI @ matrix_IO
    # In units of the outputs, so that the rate means the same of every matrix.
    scale = jnp.mean(jnp.square(target_SO - target_SO.mean(axis=0)))
    scale = jnp.maximum(scale, 1e-30)  # outputs may all be alike

    def loss(net, rows_B):
        return jnp.mean(jnp.square(net_output(net, input_SI[rows_B]) - target_SO[rows_B])) / scale

    return descended(loss, optimizer, net, order_PB)
