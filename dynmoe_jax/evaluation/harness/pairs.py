"""A context and its continuation as tokens: those that are read, and those that are scored."""

from collections.abc import Callable

from dynmoe_jax.evaluation.scoring.prefix_tree import common_length

Encode = Callable[..., list[int]]
"""(text, add_special_tokens=None) -> token ids; by default with BOS where it belongs."""


def encode_pair(encode: Encode, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encodes both together, and cuts where the text begins to differ from the context alone.

    Where the tokens of the context are the first ones of the whole text, that is how
    lm-evaluation-harness cuts.  Elsewhere a token reaches over the border (``" of the"`` of a
    tokenizer whose pieces hold several words), and the harness, which leaves out as many tokens as
    the context alone has, would lose text: here such a token is scored as a whole.

    Args:
      encode: of a tokenizer.
      context: what is read; spaces at its end go to the continuation, as in the harness.
      continuation: what is scored.

    Returns:
      the tokens that are only read and those that are scored.  Together they are those of the
      whole text; only where that has none for the continuation (a tokenizer without bytes knows
      neither of two characters) is the continuation encoded alone.  The first may be none if there
      is no BOS, the second if the continuation is empty.
    """
    kept = context.rstrip()
    context, continuation = kept, context[len(kept) :] + continuation
    whole, before = encode(context + continuation), encode(context)
    shared = common_length(before, whole)
    if shared == len(whole):
        return before, encode(continuation, add_special_tokens=False)
    return whole[:shared], whole[shared:]
