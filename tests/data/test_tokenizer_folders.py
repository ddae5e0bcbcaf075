"""Tokenizer folders: what is refused in a sentence, what is warned of, ids with gaps."""

import numpy as np
import pytest

from dynmoe_jax.data import DataError, open_tokenizer
from dynmoe_jax.evaluation.heldout import Sums, evaluate
from tests.data.tokenizers.tokenizer_folders import (
    FAST,
    LLAMA,
    NAMED,
    byte_level,
    changed,
    folder_of,
    llama_like,
    sentencepiece_model,
    template,
    token,
    unigram,
    write,
)

TWO_BEFORE = template("<s>", "</s>")
TWO_BEFORE["single"].insert(0, TWO_BEFORE["single"][0])
UNDESCRIBED = template("<s>") | {"special_tokens": {}}
PREFIXED = changed(byte_level(), model_continuing_subword_prefix="##")
COLLIDING = changed(
    byte_level(),
    model_vocab={
        text: 300 if text == "<s>" else number
        for text, number in byte_level()["model"]["vocab"].items()
    },
    added_tokens=[token(298, "[X]"), token(300, "<s>"), token(1, "</s>")],
)
FAR = changed(byte_level(), model_vocab=byte_level()["model"]["vocab"] | {"far": 2**31})
REFUSED = {
    "a class of its own": (
        folder_of(byte_level(), FAST | {"tokenizer_class": "BertTokenizer"}),
        r"tokenizer_class 'BertTokenizer'.* is not known here; PreTrainedTokenizerFast",
    ),
    "code": (
        folder_of(byte_level(), FAST | {"auto_map": {"AutoTokenizer": ["a.B", None]}}),
        "auto_map to code of its own, which is not run here",
    ),
    "two tokens before": (
        folder_of(changed(byte_level(), post_processor=TWO_BEFORE), FAST),
        "post-processor makes <s> <s> TEXT </s> of a text",
    ),
    "another token before": (
        folder_of(changed(byte_level(), post_processor=template("</s>")), FAST),
        "post-processor makes </s> TEXT of a text",
    ),
    "a template that does not describe its token": (
        folder_of(changed(byte_level(), post_processor=UNDESCRIBED), FAST),
        "post-processor does not describe '<s>'",
    ),
    "merges without their prefix": (
        folder_of(PREFIXED, FAST),
        "merges have '.*' and '.*', which make no token",
    ),
    "merges that make no token": (
        folder_of(changed(byte_level(), model_merges=[["the", "Ġreturning"]]), FAST),
        "merges have 'the' and 'Ġreturning', which make no token",
    ),
    "merges of three": (
        folder_of(changed(byte_level(), model_merges=["a b c"]), FAST),
        "merges have 'a b c', which is no pair of tokens",
    ),
    "two tokens of one id": (folder_of(COLLIDING, FAST), "2 of its tokens have the id 300"),
    "an id far away": (folder_of(FAR, FAST), "one has the id 2147483648"),
    "dropout": (folder_of(changed(byte_level(), model_dropout=0.5), FAST), "at random"),
    "no EOS": (folder_of(byte_level(), {"bos_token": "<s>"}), "names no eos_token"),
    "EOS null": (folder_of(byte_level(), FAST | {"eos_token": None}), "names no eos_token"),
    "EOS empty": (folder_of(byte_level(), FAST | {"eos_token": ""}), "eos_token='' is no token"),
    "a number for a token": (folder_of(byte_level(), FAST | {"eos_token": 1}), "not 1"),
    "ids that are none": (
        folder_of(byte_level(), FAST, added_tokens={"[X]": 0.5}),
        "the id of an added token is 0.5",
    ),
    "described twice": (
        folder_of(
            byte_level(),
            FAST | {"added_tokens_decoder": {
                "300": {"content": "[X]", "special": True},
                "301": {"content": "[X]", "special": False},
            }},
        ),
        r"'\[X\]' is described twice",
    ),
    "a list": (folder_of(byte_level(), FAST, added_tokens=[]), "added_tokens.json must hold"),
    "no SentencePiece model": ({"tokenizer.model": b"\xff" * 9}, "no SentencePiece model"),
    "an empty model": ({"tokenizer.model": b""}, "no unigram and no byte-pair model"),
    "a class without such a model": (
        {
            "tokenizer.model": sentencepiece_model(),
            "tokenizer_config.json": FAST | {"tokenizer_class": "Qwen2Tokenizer"},
        },
        "a Qwen2Tokenizer has no tokenizer.model; name LlamaTokenizer or",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    files, message = REFUSED[name]
    with pytest.raises(DataError, match=message) as caught:
        open_tokenizer(write(tmp_path, files))
    assert str(caught.value).startswith(str(tmp_path))
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


ADDED = {"added_tokens": {"[X]": 305, "[Y]": 306}}
WARNED = {
    "BOS asked for, but not put": (
        folder_of(byte_level(), LLAMA | {"add_bos_token": True}),
        "add_bos_token=true, but tokenizer.json puts none before a text",
    ),
    "BOS put, but not asked for": (
        folder_of(
            changed(byte_level(), post_processor=template("<s>")), LLAMA | {"add_bos_token": False}
        ),
        "add_bos_token=false, but tokenizer.json puts one before a text",
    ),
    "ids that move": (
        folder_of(byte_level(), FAST, **ADDED),
        "give '[X]' the id 305, but it is read as 300, as in transformers",
    ),
}


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", WARNED)
def test_what_is_warned_of(name, tmp_path, capsys):
    files, sentence = WARNED[name]
    open_tokenizer(write(tmp_path, files))
    assert sentence in said(capsys)


def test_nothing_is_said_of_a_usual_folder_nor_of_a_kept_one(tmp_path, capsys):
    files = folder_of(
        changed(byte_level(), post_processor=template("<s>")), LLAMA | {"add_bos_token": True}
    )
    open_tokenizer(write(tmp_path / "usual", files))
    assert not said(capsys)
    moving = open_tokenizer(write(tmp_path / "moving", folder_of(byte_level(), FAST, **ADDED)))
    assert said(capsys)
    moving.save(tmp_path / "run" / "tokenizer")
    type(moving).load_kept(tmp_path / "run" / "tokenizer")
    assert not said(capsys)


def test_a_model_that_is_read_alone_says_so(tmp_path, capsys):
    model = {"tokenizer.model": sentencepiece_model()}
    write(tmp_path, model)
    open_tokenizer(tmp_path / "tokenizer.model")
    assert not said(capsys)
    write(tmp_path, {"added_tokens.json": {"<|im_end|>": 300}})
    open_tokenizer(tmp_path / "tokenizer.model")
    assert "is read alone; name its folder to have added_tokens.json read too" in said(capsys)


def test_a_template_names_the_token_that_begins_a_text(tmp_path):
    main = changed(byte_level(), post_processor=template("<s>"))
    tokenizer = open_tokenizer(write(tmp_path, folder_of(main, {"eos_token": "</s>"})))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.begins_with_bos) == (0, 1, True)


def test_ids_with_gaps_have_a_place_in_every_table(tmp_path):
    vocabulary = {
        text: {0: 300, 1: 301}.get(number, number)
        for text, number in byte_level()["model"]["vocab"].items()
        if number < 259
    }
    main = changed(byte_level(), model_vocab=vocabulary, model_merges=[], added_tokens=[])
    tokenizer = open_tokenizer(write(tmp_path, folder_of(main, NAMED)))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (300, 301, 302)
    assert tokenizer.token_bytes_V.shape == (302,)
    # 280 is in the gap.
    ids = [300, *tokenizer.encode("the cat").tolist(), 280, 301, 5000]
    assert tokenizer.decode(ids) == "the cat"
    # As a held-out evaluation meets them.
    targets = np.array([[*tokenizer.encode("the cat"), 301]])
    batch = {"targets": targets, "segment_ids": np.ones_like(targets)}
    none = np.zeros((0, 1), np.int32)
    found = evaluate(
        lambda params, batch: Sums(np.float64(7.0), np.int64(targets.size), none, none),
        None,
        {"made": [batch]},
        tokenizer.token_bytes_V,
        place=lambda batch: batch,
    )
    np.testing.assert_allclose(found.bits_per_byte, 1 / np.log(2), rtol=1e-12)


def test_what_no_token_stands_for_is_refused_when_it_is_met(tmp_path):
    main = changed(unigram(), model_unk_id=None)
    tokenizer = open_tokenizer(write(tmp_path, folder_of(main, FAST)))
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    with pytest.raises(DataError, match="the tokenizer cannot encode '数': "):
        tokenizer.encode("数")


def test_ids_beyond_a_sentencepiece_model_give_no_text(tmp_path):
    write(tmp_path, {"t.model": sentencepiece_model()})
    tokenizer = open_tokenizer(tmp_path / "t.model")
    ids = tokenizer.encode("the cat").tolist()
    assert tokenizer.decode([*ids, 300, 10**6]) == tokenizer.decode(ids)


def test_classes_of_models_are_those_of_transformers():
    reason = "needs the extra test"
    auto = pytest.importorskip("transformers.models.auto.tokenization_auto", reason=reason)
    from dynmoe_jax.data.tokenizers.hf_classes import CLASS_OF_MODEL, CLASSES, PLAIN_MODELS

    names = auto.TOKENIZER_MAPPING_NAMES
    assert {kind: names[kind] for kind in CLASS_OF_MODEL} == CLASS_OF_MODEL
    # Mistral's own library is another extra of transformers.
    plain = {"TokenizersBackend", "MistralCommonBackend"}
    assert {names[kind] for kind in PLAIN_MODELS} <= plain
    assert set(CLASS_OF_MODEL.values()) <= CLASSES.keys()


def test_a_llama_folder_travels_as_it_is_read(tmp_path):
    # The class puts parts of its own in the place of those of tokenizer.json.
    files = folder_of(llama_like(), LLAMA | {"unk_token": "<unk>"})
    tokenizer = open_tokenizer(write(tmp_path, files))
    assert tokenizer.decode(tokenizer.encode("  the cat")) == " the cat"
    assert b"Metaspace" in tokenizer.files["tokenizer.json"]
    assert b"PreTrainedTokenizerFast" in tokenizer.files["tokenizer_config.json"]
