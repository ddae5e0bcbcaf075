"""Comparison of a tokenizer with transformers' ``AutoTokenizer`` on the same folder."""

import os

from tests.data.tokenizers.tokenizer_folders import PROBES

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def read_by_transformers(folder):
    """``AutoTokenizer`` on a folder, with nothing on the screen."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.AutoTokenizer.from_pretrained(folder)


def differences(ours, theirs) -> list[str]:
    """Where a tokenizer is not that of transformers; empty if nowhere."""
    found = []

    def compare(what, mine, wanted):
        if mine != wanted:
            found.append(f"{what}: {mine!r}, not {wanted!r}")

    size = 1 + max(theirs.get_vocab().values())
    compare("size", ours.vocab_size, size)
    compare("sizes of bytes", len(ours.token_bytes_V), size)
    compare("EOS", ours.eos_id, theirs.eos_token_id)
    if theirs.bos_token_id is not None:
        compare("BOS", ours.bos_id, theirs.bos_token_id)
    before = [ours.bos_id] if ours.begins_with_bos else []
    after = [ours.eos_id] if ours.ends_with_eos else []
    for text in PROBES:
        ids = theirs(text, add_special_tokens=False).input_ids
        compare(f"ids of {text!r}", ours.encode(text).tolist(), ids)
        compare(f"{text!r} as a whole", [*before, *ids, *after], theirs(text).input_ids)
        compare(f"text of {ids}", ours.decode(ids), theirs.decode(ids, skip_special_tokens=True))
    # The first and the last ones are special or added; others are alike.
    for number in sorted({*range(5), *range(5, size, 9), *range(max(0, size - 30), size)}):
        text = theirs.decode([number], skip_special_tokens=True)
        compare(f"text of {number}", ours.decode([number]), text)
    return found
