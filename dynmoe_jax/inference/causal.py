"""A decoder that can write text although training dropped choices for the sake of later tokens."""

import dataclasses

from flax import nnx

from dynmoe_jax.console import warn
from dynmoe_jax.model import Decoder, decoder_structure
from dynmoe_jax.registry import chosen, names_in, with_choice


def without_later_tokens(decoder: Decoder) -> Decoder:
    """The decoder without transforms that drop choices for the sake of later tokens.

    Those are not there while text is written; evaluation scores without them, too.  A router that
    looks at later tokens stays, for the generator to refuse.
    """
    model, moe = decoder.config, decoder.config.moe
    names = names_in(moe.transforms)
    transforms = zip(names, chosen(moe, "transforms"), strict=True)
    causal = [name for name, transform in transforms if transform.causal]
    if causal == names or model.looks_ahead or not model.num_moe_layers:
        return decoder
    left_out = ", ".join(name for name in names if name not in causal)
    warn(
        f"The run drops choices of experts for the sake of later tokens ({left_out}); here none "
        "are dropped for them."
    )
    exact = dataclasses.replace(model, moe=with_choice(moe, "transforms", causal))
    return nnx.merge(decoder_structure(exact), nnx.split(decoder)[1])
