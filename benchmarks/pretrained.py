"""Models and tokenizers by transformers, from a folder or a GGUF file."""

from pathlib import Path
from typing import Any


def from_pretrained(kind: Any, path: str, **more: Any) -> Any:
    """Transformers' ``kind`` from a folder or a GGUF file."""
    file = Path(path)
    if file.suffix == ".gguf":
        return kind.from_pretrained(file.parent, gguf_file=file.name, **more)
    return kind.from_pretrained(file, **more)
