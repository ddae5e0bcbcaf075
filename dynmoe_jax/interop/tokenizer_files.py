"""The tokenizer of an exported model, in files that transformers reads."""

from pathlib import Path

from dynmoe_jax.data import SentencePieceTokenizer, Tokenizer

_SPACE = "▁"


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files of one of Hugging Face's format again, and converts one of SentencePiece.

    Args:
      tokenizer: the model's.
      folder: of the exported model.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        for name, content in tokenizer.files.items():
            (folder / name).write_bytes(content)
        return
    tokenizer.save(folder / SentencePieceTokenizer.place)
