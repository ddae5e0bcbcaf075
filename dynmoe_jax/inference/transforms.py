"""A decoder without transforms of its routing, which inference may have to leave out."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx

from dynmoe_jax.console import warn
from dynmoe_jax.model import Decoder, decoder_structure
from dynmoe_jax.registry import chosen, names_in, with_choice
from dynmoe_jax.routing.transforms import Transform


def keeping(decoder: Decoder, keeps: Callable[[Transform], bool], **changes: Any) -> Decoder:
    """The same model with some of its transforms; itself where that changes nothing.

    Args:
      decoder: the model.
      keeps: whether a transform stays.
      changes: other values of settings of its MoE layers.
    """
    model, moe = decoder.config, decoder.config.moe
    names = names_in(moe.transforms)
    transforms = zip(names, chosen(moe, "transforms"), strict=True)
    kept = [name for name, transform in transforms if keeps(transform)]
    other = moe if kept == names else with_choice(moe, "transforms", kept)
    other = dataclasses.replace(other, **changes)
    if other == moe:
        return decoder
    structure = decoder_structure(dataclasses.replace(model, moe=other))
    return nnx.merge(structure, nnx.split(decoder)[1])


def without_later_tokens(decoder: Decoder) -> Decoder:
    """The decoder without transforms that drop choices for the sake of later tokens.

    Those are not there while text is written; evaluation scores without them, too.  A router that
    looks at later tokens stays, for the generator to refuse.
    """
    if decoder.config.looks_ahead or not decoder.config.num_moe_layers:
        return decoder
    causal = keeping(decoder, lambda transform: transform.causal)
    if causal is not decoder:
        warn(
            "The run drops choices of experts for the sake of later tokens "
            f"(config.model.moe.transforms={decoder.config.moe.transforms!r}); here none are "
            "dropped for them."
        )
    return causal
