"""Tokens that a tokenizer of Hugging Face's library puts before and after a text."""

import json

import tokenizers
from tokenizers import models

from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.tokenizers.hf_tokens import Token, content_of


def around(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids that a tokenizer puts before and after a text.

    Raises:
      DataError: it leaves the text out.
    """
    text, inside = "a", tokenizer.encode("a", add_special_tokens=False).ids
    if not inside:
        # Some vocabularies lack the letter.
        texts = iter(tokenizer.get_vocab(with_added_tokens=False))
        while not inside and (text := next(texts, None)) is not None:
            inside = tokenizer.encode(text, add_special_tokens=False).ids
    if not inside:
        return tokenizer.encode("a").ids, []
    encoded = tokenizer.encode(text)
    if 0 not in encoded.sequence_ids:
        raise DataError("its post-processor leaves the text out.")
    first = encoded.sequence_ids.index(0)
    return encoded.ids[:first], encoded.ids[first + len(inside) :]


def put_around(made: tokenizers.Tokenizer, before: Token | None, after: Token | None) -> None:
    """Has a tokenizer put tokens around a text.

    Args:
      made: the tokenizer, which has the tokens.
      before: the token before a text, None for none.
      after: the token after it.
    """
    texts = [content_of(token) if token is not None else None for token in (before, after)]
    sides = [[{"SpecialToken": {"id": text, "type_id": 0}}] if text else [] for text in texts]
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [*sides[0], first, *sides[1]],
        "pair": [*sides[0], first, second, *sides[1]],
        "special_tokens": {
            text: {"id": text, "ids": [made.token_to_id(text)], "tokens": [text]}
            for text in texts
            if text
        },
    }
    # Given to its constructor, a token such as "$" would be taken for a text.
    bare = {**json.loads(tokenizers.Tokenizer(models.BPE()).to_str()), "post_processor": template}
    made.post_processor = tokenizers.Tokenizer.from_str(json.dumps(bare)).post_processor


def check_around(
    made: tokenizers.Tokenizer, names: dict[str, str], before: list[int], after: list[int]
) -> None:
    """Checks that no more stands around a text than the tokens that begin and end a document.

    Args:
      made: the tokenizer.
      names: texts of its named tokens.
      before: token ids that it puts before a text.
      after: token ids that it puts after it.

    Raises:
      DataError: more does.
    """
    begins = [made.token_to_id(names["bos_token"])] if "bos_token" in names else []
    ends = [made.token_to_id(names["eos_token"])] if "eos_token" in names else []
    if before not in ([], begins) or after not in ([], ends):
        put = [*map(made.id_to_token, before), "TEXT", *map(made.id_to_token, after)]
        raise DataError(
            f"its post-processor makes {' '.join(map(str, put))} of a text, but nothing else than "
            "bos_token before it and eos_token after it can be put here."
        )
