"""Records of written texts, as JSON."""

from collections.abc import Sequence
from typing import Any

from dynmoe_jax.inference.writer import Written


def as_record(samples: Sequence[Written]) -> dict[str, Any]:
    """The texts of one prompt.

    ``experts`` has a row for each token and in it a number for each MoE layer; it is empty in a
    dense model.  ``posterior`` has a row of the members of an ensemble for each token, and is empty
    of one model.  ``finish_reason`` is ``"stop"`` or ``"length"``.
    """
    return {
        "prompt": samples[0].prompt,
        "prompt_tokens": samples[0].prompt_tokens,
        "samples": [
            {
                "text": written.text,
                "tokens": written.ids,
                "pieces": written.pieces,
                "experts": written.experts_nN if written.experts_nN.shape[1] else [],
                "posterior": written.posterior_nJ if written.posterior_nJ.shape[1] else [],
                "finish_reason": "stop" if written.ended else "length",
            }
            for written in samples
        ],
    }
