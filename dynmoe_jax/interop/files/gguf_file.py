"""GGUF, llama.cpp's format: one file with settings, tokenizer and (mostly quantised) tensors.

Tensors come out as float32, under the names and in the layouts of Hugging Face, so that the rules
of an architecture hold for both formats.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from dynmoe_jax.data import Tokenizer
from dynmoe_jax.interop.architectures.layouts import Shape
from dynmoe_jax.interop.files.gguf_endings import ends_in_gguf
from dynmoe_jax.interop.files.gguf_settings import llama_settings
from dynmoe_jax.interop.files.gguf_tokenizer import tokenizer_of
from dynmoe_jax.interop.quoted import named
from dynmoe_jax.runs.errors import CheckpointError

_LAYER = "model.layers.{layer}."
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm.weight": _LAYER + "input_layernorm.weight",
    "attn_q.weight": _LAYER + "self_attn.q_proj.weight",
    "attn_k.weight": _LAYER + "self_attn.k_proj.weight",
    "attn_v.weight": _LAYER + "self_attn.v_proj.weight",
    "attn_output.weight": _LAYER + "self_attn.o_proj.weight",
    "ffn_norm.weight": _LAYER + "post_attention_layernorm.weight",
    "ffn_gate.weight": _LAYER + "mlp.gate_proj.weight",
    "ffn_up.weight": _LAYER + "mlp.up_proj.weight",
    "ffn_down.weight": _LAYER + "mlp.down_proj.weight",
}
_DAMAGE = (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError)
"""Errors of the package ``gguf`` where a file is damaged."""

MAGIC = b"GGUF"
"""The first bytes of a file."""


class _Reader(gguf.GGUFReader):
    """A reader that does not look for numbers behind the end of a file, where there are none."""

    def _get(self, offset, dtype, count=1, *rest, **named_rest):
        # A plain view: slices of a memmap keep books about it, which is most of the time that a
        # vocabulary takes to read.
        self.data = self.data.view(np.ndarray)
        found = super()._get(offset, dtype, count, *rest, **named_rest)
        if len(found) < int(count):
            raise ValueError(f"it ends at byte {len(self.data)}, within what it says it holds")
        return found


class GgufFile:
    """A model of llama.cpp's architecture ``llama``.

    Attributes:
      settings: as ``config.json`` of ``LlamaForCausalLM`` would have them.

    Raises:
      CheckpointError: there is no such file, it is no GGUF, or holds another architecture.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            # Maps the file: what is not asked for is not read.
            self._reader = _Reader(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist.") from None
        except _DAMAGE as error:
            raise self._unreadable(error) from error
        if self._reader.byte_order == "S":
            raise CheckpointError(f"{path} is a big-endian GGUF file; convert it anew.")
        self._check_places()
        self._tensors = {_hf_name(tensor.name): tensor for tensor in self._reader.tensors}
        self.settings = self._hf_settings()

    def metadata(self, name: str) -> Any:
        """The value of a metadata key; None where the file lacks it.

        Raises:
          CheckpointError: it cannot be read.
        """
        field = self._reader.get_field(name)
        try:
            return None if field is None else field.contents()
        except _DAMAGE as error:
            raise self._unreadable(error) from error

    def tokenizer(self) -> Tokenizer | None:
        """The byte-pair vocabulary of the file.

        Raises:
          CheckpointError: it is of another kind.
        """
        tokenizer = tokenizer_of(self.metadata)
        return tokenizer and tokenizer.with_ends(ends_in_gguf(self.metadata))

    def shapes(self) -> dict[str, Shape]:
        """Shapes by name, from the file's header alone."""
        # GGUF counts axes from the innermost.
        return {
            name: tuple(int(length) for length in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def tensors(self, wanted: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Dequantised to float32, one at a time.

        Raises:
          CheckpointError: a tensor is quantised in a way that ``gguf`` cannot undo.
        """
        for name in wanted:
            tensor = self._tensors[name]
            try:
                values = gguf.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError:
                raise CheckpointError(
                    f"tensor {tensor.name} is quantised as {tensor.tensor_type.name}, which "
                    "cannot be read; convert the file to another type."
                ) from None
            yield name, self._in_hf_order(name, values.astype(np.float32, copy=False))

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers."""
        return np.array_equal(*(tensor for _, tensor in self.tensors([one, other])), equal_nan=True)

    def _in_hf_order(self, name: str, values: np.ndarray) -> np.ndarray:
        """Rows of queries and keys as Hugging Face has them: all first halves, all second ones.

        llama.cpp rotates neighbours, so its converter interleaves the two halves of a head.
        """
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        kind = name.split(".")[-2]
        if kind not in heads:
            return values
        paired = values.reshape(self.settings[heads[kind]], -1, 2, values.shape[-1])
        return paired.swapaxes(1, 2).reshape(values.shape)

    def _hf_settings(self) -> dict[str, Any]:
        found = llama_settings(self.metadata, str(self._path))
        rows = self.shapes().get("model.embed_tokens.weight", ())[:1]
        if not rows:
            raise CheckpointError(f"{self._path} lacks the tensor token_embd.weight.")
        return {
            **found,
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": rows[0],
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
        }

    def _check_places(self) -> None:
        """Raises CheckpointError unless each tensor begins where the one before it ends."""
        reader = self._reader
        expected = int(reader.data_offset)
        for tensor in reader.tensors:
            if tensor.data_offset != expected:
                raise CheckpointError(
                    f"{self._path} puts the tensor {named(tensor.name)} to byte "
                    f"{tensor.data_offset}, where {expected} follows the one before it."
                )
            expected += -(-int(tensor.n_bytes) // int(reader.alignment)) * int(reader.alignment)

    def _unreadable(self, error: Exception) -> CheckpointError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return CheckpointError(f"{self._path} cannot be read as GGUF: {reason}.")


def _hf_name(name: str) -> str:
    """Hugging Face's name; an unknown one stays as it is, to be named in the error."""
    found = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if not found:
        return _NAMES.get(name, name)
    layer, part = found.groups()
    return _NAMES[part].format(layer=layer) if part in _NAMES else name
