"""UL2: a mixture of denoisers (arXiv 2205.05131), in the proportions of OpenMoE.

OpenMoE (arXiv 2402.01739) makes half of its examples prefixes with their continuation, and masks
spans in the others: short and few, short and many, long and many.  It is a decoder alone, so inputs
and targets stand behind each other in one sequence with causal attention, and the loss is that of
the targets.  Late in training OpenMoE-8B goes over to plain language modelling, because the loss
of UL2 falls no more (``until_step``).
"""

import dataclasses
import functools
import math

import numpy as np

from dynmoe_jax.data.corruption.corruption import Corrupt, Corruption, Example
from dynmoe_jax.data.corruption.spans import Denoiser, masked
from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.tokenizers.api import Tokenizer
from dynmoe_jax.data.tokenizers.endings import special_tokens_of
from dynmoe_jax.fields import run_setting
from dynmoe_jax.registry import CORRUPTIONS

PREFIX = "prefix"


@CORRUPTIONS.register("ul2")
@dataclasses.dataclass(frozen=True)
class UL2(Corruption):
    """Draws a denoiser for each piece of a document."""

    denoisers: str = run_setting(
        "prefix/0.5=5,3/0.15=1,8/0.15=1,3/0.5=1,8/0.5=1,64/0.5=1",
        "mean span length/masked share=weight of each; prefix masks the end of a text",
    )
    sentinel: str = run_setting(
        "<extra_id_{}>", "special tokens that stand for spans, with {} for their numbers from 0"
    )
    num_sentinels: int = run_setting(
        100,
        "sentinels that a tokenizer which is trained here reserves, and most spans of an example",
        low=1,
    )

    def obstacle(self) -> str:
        """Says what cannot be read."""
        if self.sentinel.count("{}") != 1:
            return f"sentinel={self.sentinel!r} must have one {{}} for the number"
        try:
            return "" if self.shares else "denoisers='' names none; name at least one"
        except ValueError as error:
            return str(error)

    @functools.cached_property
    def shares(self) -> dict[Denoiser, float]:
        """The denoisers, and the share of examples that each makes.

        Raises:
          ValueError: the setting cannot be read.
        """
        found: dict[Denoiser, float] = {}
        for entry in filter(None, (part.strip() for part in self.denoisers.split(","))):
            denoiser, weight = _parsed(entry)
            if denoiser is None or denoiser in found:
                raise ValueError(
                    f"denoisers holds {entry!r}; write each once as 'length/share=weight', with a "
                    "mean length of at least 1 or 'prefix', a share between 0 and 1 and a weight "
                    "above 0"
                )
            found[denoiser] = weight
        return {denoiser: weight / sum(found.values()) for denoiser, weight in found.items()}

    @property
    def reserved(self) -> tuple[str, ...]:
        """The sentinels."""
        # Not format(), for which other braces of a token's name have a meaning.
        return tuple(self.sentinel.replace("{}", str(n)) for n in range(self.num_sentinels))

    def prepared(self, tokenizer: Tokenizer) -> Corrupt:
        """Makes examples with the sentinels that a tokenizer has.

        Raises:
          DataError: it has none.
        """
        special, rows = special_tokens_of(tokenizer), tokenizer.vocab_size
        ids = {text: token for token, text in special.items() if token < rows}
        found = [ids[name] for name in self.reserved if name in ids]
        if not found and any(denoiser.span for denoiser in self.shares):
            raise DataError(
                f"config.data.ul2.sentinel={self.sentinel!r} names no special token of the "
                f"tokenizer, such as {self.reserved[0]!r}; name some that it has, or leave "
                "config.data.tokenizer and config.train.init_from empty, to have a tokenizer "
                "trained with them."
            )
        denoisers, shares = zip(*self.shares.items(), strict=True)
        edges, sentinels = np.cumsum(shares), np.array(found, np.int32)
        # The last edge may be a little less than 1.
        edges[-1] = 1.0

        def corrupt(ids, room, draw):
            number, *chance = draw.random(3)
            denoiser = denoisers[int(np.searchsorted(edges, number, side="right"))]
            taken = denoiser.fitting(len(ids), room, len(sentinels), chance)
            return Example(*masked(ids[:taken], denoiser, sentinels, chance, draw), taken)

        return corrupt


def _parsed(entry: str) -> tuple[Denoiser | None, float]:
    """(denoiser, weight) of an entry; None where it is none."""
    name, _, weight = entry.partition("=")
    span, _, density = (part.strip() for part in name.partition("/"))
    try:
        found = Denoiser(0.0 if span == PREFIX else float(span), float(density)), float(weight)
    except ValueError:
        return None, math.nan
    long_enough = span == PREFIX or 1 <= found[0].span < math.inf
    fits = long_enough and 0 < found[0].density < 1 and 0 < found[1] < math.inf
    return found if fits else (None, math.nan)
