"""Settings of a Llama by the metadata of a GGUF file, as ``config.json`` would have them.

llama.cpp decides what a key means, which keys there must be, and what stands in for others.
"""

from collections.abc import Callable
from typing import Any

from dynmoe_jax.interop.quoted import shown
from dynmoe_jax.runs.errors import CheckpointError

Metadata = Callable[[str], Any]
"""The value of a key; None where a file lacks it."""

_COUNTS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_EPSILON, _THETA = "attention.layer_norm_rms_epsilon", "rope.freq_base"
_UNSCALED = (None, 0, 1)


def llama_settings(metadata: Metadata, file: str) -> dict[str, Any]:
    """Settings of ``LlamaForCausalLM``, but for what the tensors decide.

    Args:
      metadata: of the file.
      file: its name, for messages.

    Raises:
      CheckpointError: it holds another architecture, a part of a model, or a model that is not
        computed here; or a key is missing, or has a value of another type.
    """
    kind, experts = metadata("general.architecture"), metadata("llama.expert_count")
    if kind != "llama" or experts:
        raise CheckpointError(
            f"{file} holds the architecture {shown(kind)}"
            f"{' with experts' if kind == 'llama' else ''}; of GGUF files, dense ones of 'llama' "
            "can be read."
        )
    if metadata("split.count") not in _UNSCALED:
        raise CheckpointError(
            f"{file} is one of {shown(metadata('split.count'))} parts; join them with "
            "llama-gguf-split --merge."
        )
    keys = _Keys(metadata, file)
    found = {name: keys.count(key) for key, name in _COUNTS.items()}
    heads = found["num_attention_heads"]
    found["num_key_value_heads"] = keys.count("attention.head_count_kv", heads)
    found["rms_norm_eps"] = keys.number(_EPSILON)
    found["rope_theta"] = keys.number(_THETA, 10000.0)
    found["head_dim"] = keys.head_width(found["hidden_size"] // heads)
    keys.check_positions()
    keys.check_equal("attention.causal", True)
    return found


class _Keys:
    """The keys of one file that begin with ``llama.``."""

    def __init__(self, metadata: Metadata, file: str):
        self._metadata, self._file = metadata, file

    def get(self, key: str) -> Any:
        return self._metadata(f"llama.{key}")

    def wrong(self, key: str, value: Any, what: str) -> CheckpointError:
        return CheckpointError(f"{self._file} has llama.{key}={shown(value)}, {what}.")

    def present(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None and default is None:
            raise CheckpointError(f"{self._file} lacks llama.{key}.")
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.present(key, default)
        if type(value) is not int or value < 1:
            raise self.wrong(key, value, "not a count")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.present(key, default)
        if type(value) is not float:
            raise self.wrong(key, value, "which is not a number")
        return value

    def check_equal(self, key: str, computed: Any) -> None:
        value = self.get(key)
        if value is not None and value != computed:
            raise self.wrong(key, value, f"but {computed!r} alone is computed here")

    def head_width(self, even: int) -> int:
        """The width of all heads: of queries, keys and values, and of what is rotated of them."""
        key, value = (self.count(f"attention.{part}_length", even) for part in ("key", "value"))
        if key != value:
            raise CheckpointError(
                f"{self._file} has llama.attention.key_length={key} and value_length={value}; "
                "heads of one width alone are computed here."
            )
        self.check_equal("rope.dimension_count", key)
        return key

    def check_positions(self) -> None:
        """Raises CheckpointError if positions are scaled."""
        kind, factor = self.get("rope.scaling.type"), self.get("rope.scaling.factor")
        factor = self.get("rope.scale_linear") if factor is None else factor
        kind = "linear" if kind is None else kind
        if kind != "none" and (kind != "linear" or factor not in _UNSCALED):
            raise CheckpointError(
                f"{self._file} asks for scaled rotary positions ({shown(kind)}, factor "
                f"{shown(factor)}), which are not computed here."
            )
        self.check_equal("rope.scaling.attn_factor", 1)
