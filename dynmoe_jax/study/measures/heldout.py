"""Loss and experts per token of held-out text, with replicates over documents."""

import math
from typing import Any

import numpy as np

from dynmoe_jax.model.flops import forward_flops
from dynmoe_jax.model.parameters import active_parameters, count_parameters
from dynmoe_jax.study.measures.measure import Measure
from dynmoe_jax.study.measures.trained import Tokens


class HeldOutText(Measure):
    """Every run, on the held-out text of its study."""

    def is_of(self, model):
        """All of them."""
        return True

    def take(self, run, items):
        """Bits per byte and what they cost, by domain too."""
        model, tokens, heldout = run.config.model, run.tokens, run.heldout
        by_layer = heldout.experts_per_token_by_layer
        record = {
            "tokens": len(tokens.token_T),
            "documents": int(tokens.document_T[-1]) + 1,
            **loss_of(tokens),
            "experts_per_token_by_layer": by_layer,
            "domains": {name: part.bits_per_byte for name, part in heldout.domains.items()},
            "parameters": count_parameters(model),
            "active_parameters": active_parameters(model, by_layer),
            "flops_per_token": forward_flops(model, 1, run.config.data.seq_len, by_layer),
        }
        if by_layer:
            experts_T = tokens.experts_NT.mean(axis=0)
            record["experts_per_token"] = float(experts_T.mean())
            record["experts_per_token_R"] = tokens.replicates(experts_T, np.ones_like(experts_T))
        return record


def loss_of(tokens: Tokens) -> dict[str, Any]:
    """Bits per byte, and the same of resampled documents."""
    bits_R = tokens.replicates(tokens.nll_T / math.log(2), tokens.bytes_T)
    return {"bits_per_byte": tokens.bits_per_byte, "bits_per_byte_R": bits_R}
