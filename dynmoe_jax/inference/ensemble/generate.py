"""Ensemble as what texts are written with.

Axis legend: J members.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from dynmoe_jax.config import ConfigError
from dynmoe_jax.inference.decoding import split_layers
from dynmoe_jax.inference.ensemble.decoding import Weighing, decode_ensemble, prefill_ensemble
from dynmoe_jax.inference.generate import Generator, Speed, on_every_device
from dynmoe_jax.inference.transforms import without_later_tokens
from dynmoe_jax.model import Decoder


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Models that write one text together, each weighed by how well it predicted it so far.

    Attributes:
      members: of any shapes, with one tokenizer.
      log_prior_J: logarithm of the prior of each.
      top_k: members that keep their weight at each token; 0: all.
    """

    members: tuple[Decoder, ...]
    log_prior_J: Float[np.ndarray, "J"]
    top_k: int = 0


class EnsembleGenerator(Generator):
    """Continues prompts with an ensemble; its parameters and layers are tuples of the members'."""

    _prefill, _decode = staticmethod(prefill_ensemble), staticmethod(decode_ensemble)

    def __init__(self, ensemble: Ensemble, *, copy_layers: bool = True):
        """Prepares the members, as :class:`Generator` one of them.

        Raises:
          ConfigError: a member looks at later tokens.
        """
        members = [without_later_tokens(decoder) for decoder in ensemble.members]
        for decoder in members:
            if decoder.config.cannot_write:
                raise ConfigError(decoder.config.cannot_write)
        self._structure, self._params = zip(*map(nnx.split, members), strict=True)
        self._rows = min(decoder.config.vocab_size for decoder in members)
        self.room = min(decoder.config.max_seq_len for decoder in members)
        self._whole = on_every_device(self._params)
        pairs = zip(self._structure, self._params, strict=True)
        self._layers = tuple(split_layers(*pair) for pair in pairs) if copy_layers else None
        weighing = Weighing(jnp.asarray(ensemble.log_prior_J, jnp.float32), ensemble.top_k)
        self._weighing = (weighing,)
        self._compiled = {}
        self.speed = Speed()
