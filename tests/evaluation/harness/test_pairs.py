"""Context and continuation as tokens: together they are the text, and the continuation is scored.

lm-evaluation-harness cuts the tokens of both behind as many as the context alone has, which loses
text wherever a token reaches over the border.
"""

import json
import random
from types import SimpleNamespace

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from dynmoe_jax.data import train_tokenizer
from dynmoe_jax.data.tokenizers.hf import HfTokenizer
from dynmoe_jax.evaluation.harness.pairs import encode_pair

LINE = (
    "he is one of the best in town and for the rest of us it was a day like all that came before "
    "so they went on their way to see her once more as if nothing had been said then or since"
)
WORDS = LINE.split()
SPECIAL = ["<unk>", "<s>", "</s>"]


def prose():
    """Lines in which some words stand together again and again."""
    rng = random.Random(0)
    starts = [rng.randrange(len(WORDS) - 6) for _ in range(900)]
    return [" ".join(WORDS[i : i + rng.randint(2, 6)]) + ". " for i in starts]


def in_hugging_face_form(model, trainer, **parts):
    made = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    made.train_from_iterator(prose(), trainer)
    settings_file = json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    return HfTokenizer(
        {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": settings_file.encode()}
    )


def byte_level(use_regex):
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return in_hugging_face_form(
        models.BPE(),
        trainer,
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex),
        decoder=decoders.ByteLevel(),
    )


def like_llama_2():
    """One piece over all words, bytes for what it doesn't know, a space before every text."""
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    return in_hugging_face_form(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        trainer,
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
    )


def unigram():
    """Without bytes: what it doesn't know is lost, and several such characters are one token."""
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    return in_hugging_face_form(
        models.Unigram(),
        trainer,
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


KINDS = {
    "trained here": lambda path: train_tokenizer(prose(), 420, path / "tokenizer.model"),
    "byte-level": lambda path: byte_level(use_regex=True),
    "byte-level, over word borders": lambda path: byte_level(use_regex=False),
    "like Llama-2": lambda path: like_llama_2(),
    "unigram": lambda path: unigram(),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


def encoder(tokenizer, bos):
    """As the harness asks: ``add_special_tokens`` says whether BOS is there."""

    def encode(text, add_special_tokens=None):
        ids = tokenizer.encode(text).tolist()
        with_bos = bos if add_special_tokens is None else add_special_tokens
        return [tokenizer.bos_id, *ids] if with_bos else ids

    return encode


def texts():
    words = st.lists(st.sampled_from(WORDS), min_size=2, max_size=12).map(" ".join)
    # Without the characters that SentencePiece writes for others, and without control tokens.
    odd = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<\0"), max_size=6)
    return st.tuples(odd, words, odd, words, odd).map("".join)


def cases(function):
    function = given(texts(), st.randoms(use_true_random=False), st.booleans())(function)
    return settings(max_examples=40, deadline=None, derandomize=True)(function)


@cases
def test_what_is_read_and_scored_is_the_text(tokenizer, text, rng, bos):
    cut = rng.randrange(1, len(text))
    context, continuation = text[:cut], text[cut:]
    encode = encoder(tokenizer, bos)
    before, scored = encode_pair(encode, context, continuation)
    assert scored
    whole = encode(text)
    if before + scored != whole:  # no token of the text is the continuation's own
        moved = context[len(context.rstrip()) :] + continuation
        assert (before, scored) == (encode(context.rstrip()), encode(moved, False))
        assert whole == before[: len(whole)]
        return
    if tokenizer.decode(tokenizer.encode("漢")) == "漢":  # it can spell every text
        assert tokenizer.decode(before + scored) == text
    # The continuation is scored as a whole: no token of it is among those that are only read.
    prefix = tokenizer.token_bytes_V[tokenizer.encode("a")].sum() - 1  # a space before every text
    assert tokenizer.token_bytes_V[before].sum() <= len(context.encode()) + prefix


@cases
def test_where_the_context_is_a_prefix_the_cut_is_that_of_the_harness(tokenizer, text, rng, bos):
    model = pytest.importorskip("lm_eval.api.model", reason="needs the extra eval")
    cut = rng.randrange(1, len(text))
    context, continuation = text[:cut], text[cut:]
    encode = encoder(tokenizer, bos)
    whole, alone = encode(text), encode(context.rstrip())
    assume(whole[: len(alone)] == alone and len(whole) > len(alone))
    harness = SimpleNamespace(backend="causal", tok_encode=encode)
    theirs = model.TemplateLM._encode_pair(harness, context, continuation)
    assert encode_pair(encode, context, continuation) == theirs


def test_a_token_over_the_border_is_scored_as_a_whole(tmp_path):
    tokenizer = KINDS["trained here"](tmp_path)
    encode = encoder(tokenizer, True)
    before, scored = encode_pair(encode, "he is one of", " the")
    assert tokenizer.decode(before + scored) == "he is one of the"
    assert len(encode("he is one of")) >= len(before + scored)  # the harness would score nothing
    assert tokenizer.decode(scored).endswith(" of the")


def test_a_continuation_without_a_token_in_the_text_is_encoded_alone():
    tokenizer = unigram()
    encode = encoder(tokenizer, False)
    assert encode("the 漢") == encode("the 漢字")
    assert encode_pair(encode, "the 漢", "字") == (encode("the 漢"), encode("字"))
    assert encode_pair(encode, "the", "") == (encode("the"), [])
