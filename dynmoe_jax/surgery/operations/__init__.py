"""Operations, one file each; importing the room registers them."""

from dynmoe_jax.surgery.operations import average, mix, split, stack, upcycle

__all__ = ["average", "mix", "split", "stack", "upcycle"]
