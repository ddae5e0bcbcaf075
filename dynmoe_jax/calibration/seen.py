"""Views of a layer's computation that statistics are taken of; nothing is computed unless read.

Axis legend: B batch, L positions, T = B L tokens of a batch, S sampled tokens, R rows of one
feed-forward, D model width, F hidden width, X heads side by side.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dynmoe_jax.experts.rows import Rows
from dynmoe_jax.model.attention import Attention
from dynmoe_jax.model.inputs import TokenPositions
from dynmoe_jax.model.kernels.norm.norm import forked
from dynmoe_jax.model.layer import Heads, Layer, LayerOutput

SAMPLE = "sample"
"""Name, among the arrays of a batch, of the places of its sampled tokens in T; filled up with 0."""


@dataclasses.dataclass(frozen=True)
class SeenLayer:
    """A layer and a batch that went through it.

    Attributes:
      layer: the module.
      x_BLD: the residual stream in front of it.
      output: its results, computed with :func:`mix_and_keep`.
      rows: that its experts computed; None in a dense layer.
      batch: arrays of the batch.
    """

    layer: Layer
    x_BLD: Float[Array, "B L D"]
    output: LayerOutput
    rows: Rows | None
    batch: Mapping[str, Array]

    @property
    def valid_T(self) -> Bool[Array, "T"]:
        """False for padding."""
        return self.batch["segment_ids"].reshape(-1) > 0

    @cached_property
    def input_TD(self) -> Float[Array, "T D"]:
        """The normed stream that feed-forward and router read."""
        return self._normed(self.layer.feed_forward_norm, self.output.attended_BLD)

    @property
    def attention_input_TD(self) -> Float[Array, "T D"]:
        """The normed stream that queries, keys and values are made of."""
        return self._normed(self.layer.attention_norm, self.x_BLD)

    @property
    def mixed_TX(self) -> Float[Array, "T X"]:
        """The mixed values of all heads, which go back into the stream by one matrix."""
        return self.output.kv.reshape(-1, self.output.kv.shape[-1])

    def _normed(self, norm: nnx.RMSNorm, x_BLD: Array) -> Float[Array, "T D"]:
        # The compiler computes it once, for this and for the layer.
        _, normed_BLD = forked(norm, x_BLD, self.layer.attention.plain)
        return normed_BLD.reshape(-1, normed_BLD.shape[-1])

    def sampled(self, x_TX: Float[Array, "T X"]) -> Float[Array, "S X"]:
        """The sampled tokens, float32."""
        return x_TX[self.batch[SAMPLE]].astype(jnp.float32)


def mix_and_keep(attention: Attention, heads: Heads, positions: TokenPositions):
    """Attends as in training, and keeps the mixed values."""
    mixed_BLX = attention.mixed_values(heads, positions)
    return attention.project_back(mixed_BLX), mixed_BLX


class SeenRows:
    """Rows of one feed-forward: all tokens of a dense one, or a block of rows of an expert.

    Args:
      x_RD: its inputs.
      valid_R: False for rows that do not count; they may hold anything.
      hidden: the function from inputs to (activations, hidden units).
      output: the linear one from hidden units to outputs.
      doutput_RD: the gradient of the loss by the outputs; None unless a statistic needs gradients.
    """

    def __init__(
        self,
        x_RD: Float[Array, "R D"],
        valid_R: Bool[Array, "R"],
        hidden: Callable[[Array], tuple[Array, Array]],
        output: Callable[[Array], Array],
        doutput_RD: Float[Array, "R D"] | None = None,
    ):
        self._x_RD, self._valid_R, self._doutput_RD = x_RD, valid_R, doutput_RD
        self._of_inputs, self._of_hidden = hidden, output

    @cached_property
    def _hidden(self) -> tuple[Array, Array]:
        return self._of_inputs(self._x_RD)

    @property
    def activation_RF(self) -> Float[Array, "R F"]:
        """Input of the nonlinear function: the gate of a gated feed-forward."""
        return self._hidden[0]

    @property
    def hidden_RF(self) -> Float[Array, "R F"]:
        """Input of the last matrix."""
        return self._hidden[1]

    @cached_property
    def output_RD(self) -> Float[Array, "R D"]:
        """Output of the feed-forward."""
        return self._of_hidden(self.hidden_RF)

    @cached_property
    def gradient_RF(self) -> Float[Array, "R F"]:
        """The gradient of the loss by the hidden units."""
        _, transpose = jax.vjp(self._of_hidden, self.hidden_RF)
        return transpose(self._doutput_RD.astype(self.hidden_RF.dtype))[0]

    def valid(self, x_RX: Array) -> Float[Array, "R X"]:
        """Numbers of rows, 0 where a row does not count; float32."""
        return jnp.where(self._valid_R[:, None], x_RX.astype(jnp.float32), 0.0)

    def summed(self, x_RX: Array) -> Float[Array, "X"]:
        """The sum over the rows that count, float32."""
        return jnp.sum(self.valid(x_RX), axis=0)
