"""Answers on disk while an evaluation runs, so that one that is killed goes on.

A line of JSON for each answer, under a key that names model and request.  Lines of other models, or
of tasks that are not asked for again, do no harm.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.model import Decoder
from dynmoe_jax.runs.disk import not_writable

FILE_NAME = "answers.jsonl"


class AnswerFile:
    """The answers to requests of one model.

    Args:
      path: the file; made if it is not there.
      model: what tells the model from others, of :func:`fingerprint`.
      resume: whether answers that are there count; if not, they are removed.

    Raises:
      ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path, model: str, resume: bool = True):
        self._model = model
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+" if resume else "w+", encoding="utf-8")
        except OSError as error:
            raise not_writable(path.parent, error) from error
        self._known = dict(self._read())

    def key(self, *request: Any) -> str:
        """The name of a request (anything that JSON can write) to this model."""
        text = json.dumps([self._model, *request], ensure_ascii=True, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def get(self, key: str) -> dict[str, Any] | None:
        """An answer that was written before."""
        return self._known.get(key)

    def put(self, answers: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Writes answers down; a process that dies after this has them."""
        for key, answer in answers:
            self._known[key] = answer
            self._file.write(json.dumps({"key": key, **answer}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _read(self) -> Iterable[tuple[str, dict[str, Any]]]:
        self._file.seek(0)
        whole = True
        for line in self._file:
            whole = line.endswith("\n")
            try:
                answer = json.loads(line)
                yield answer.pop("key"), answer
            except (ValueError, KeyError, AttributeError, TypeError):
                continue  # the line that a kill has torn
        if not whole:
            self._file.write("\n")


def fingerprint(decoder: Decoder, tokenizer_fingerprint: str) -> str:
    """Hex digest of what decides a model's answers: settings, parameters, tokenizer.

    CRC-32 for the parameters, as for checkpoints: the danger is confusion, not forgery.
    """
    digest = hashlib.sha256(tokenizer_fingerprint.encode())
    digest.update(json.dumps(config.to_dict(decoder.config), sort_keys=True).encode())
    for path, leaf in nnx.state(decoder, nnx.Param).flat_state():
        values = np.ascontiguousarray(leaf[...])
        crc = zlib.crc32(values.reshape(-1).view(np.uint8))
        digest.update(f"{path} {values.dtype} {values.shape} {crc}".encode())
    return digest.hexdigest()
