"""The marks that one MoE layer has to meet, as ratios of medians within one run."""

import numpy as np

from benchmarks.layer_cases import PRESETS, Preset
from benchmarks.timing import Mark, Ratio, ratio
from dynmoe_jax.experts.layer_cost import expert_weight_bytes, layer_cost

TIMES = (
    ("top-2 forward+backward, ours / PyTorch loop over experts", "ours/top_2/train",
     "torch_loop/top_2/train", 1.0),
    ("top-2 forward+backward, ours / Hugging Face grouped_mm", "ours/top_2/train",
     "hf_grouped_mm/top_2/train", 0.95),
    ("top-2 forward+backward, ours / dense layer of equal FLOPs", "ours/top_2/train",
     "dense/top_2/train", 1.12),
    ("forward+backward, four experts per token / one", "ours/top_4/train",
     "ours/top_1/train", 4.3),
    ("forward+backward, top-p of mean 2 / top-2", "ours/top_p_2/train",
     "ours/top_2/train", 1.05),
)  # fmt: skip


def marks(preset: Preset, seconds: dict, temp_bytes: dict, used: dict) -> list[Mark]:
    """The marks that the cases of a run decide.

    Args:
      preset: the shape.
      seconds: of each ``method/choice/direction`` in each round, and of ``copy``.
      temp_bytes: of the compiled cases.
      used: rows and experts of each choice.
    """
    found = [
        Mark(name, limit, ratio(seconds[over], seconds[under]))
        for name, over, under, limit in TIMES
        if over in seconds and under in seconds
    ]
    over, under = "ours/top_p_2/train", "dense/top_p_2/train"
    if temp_bytes.get(over) and temp_bytes.get(under):
        name = "memory beyond arguments and results, top-p of mean 2 / dense layer of equal FLOPs"
        share = temp_bytes[over] / temp_bytes[under]
        found.append(Mark(name, 1.6, Ratio(share, share, share)))
    if preset == PRESETS["paper"]:
        found += [
            _useful_rate(preset, seconds[f"ours/{choice}/train"], choice, used[choice].rows)
            for choice in used
            if f"ours/{choice}/train" in seconds
        ]
    if preset.tokens <= 64:
        found += [
            _reading(preset, seconds, choice, used[choice].experts)
            for choice in used
            if f"ours/{choice}/forward" in seconds
        ]
    return found


def _useful_rate(preset: Preset, seconds, choice: str, rows: int) -> Mark:
    """TFLOP/s of the rows used, forward and backward; the mark is for one H100 in bfloat16."""
    cost = layer_cost(rows, preset.num_experts, preset.width, preset.hidden_width, backward=True)
    rate = cost.flops / seconds / 1e12
    low, high = np.nanpercentile(rate, [25, 75])
    value = Ratio(float(np.nanmedian(rate)), float(low), float(high))
    return Mark(f"{choice} forward+backward, useful TFLOP/s (one H100)", 400, value, at_least=True)


def _reading(preset: Preset, seconds: dict, choice: str, experts: int) -> Mark:
    """Time over what it takes to read the weights of the experts used, once."""
    # The copy reads and writes the weights of all experts, so reading those used takes this share.
    copied = 2 * expert_weight_bytes(preset.num_experts, preset.width, preset.hidden_width)
    read = expert_weight_bytes(experts, preset.width, preset.hidden_width)
    name = f"{choice} forward / reading {experts} experts at copy bandwidth"
    reading_s = seconds["copy"] * read / copied
    return Mark(name, 2.0, ratio(seconds[f"ours/{choice}/forward"], reading_s))
