"""Sizes of the study: what its models share, and how much of it is done."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from dynmoe_jax import config

# With LLVM emitting what MLIR would; a flag that XLA doesn't know ends the process.
_OLD_EMITTERS = tuple(int(x) for x in version("jaxlib").split(".")[:3]) < (0, 11, 1)
CHEAP_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if _OLD_EMITTERS else "")
)
"""XLA's flags for programs that compile for longer than they run."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of the study.

    Attributes:
      about: one line for people.
      shared: makes the settings that all models share, those of MoE-Dynamic.
      wider: settings of the dense model with as many active parameters as MoE-Top2.
      seeds: that it is meant for.
      ablations: names of those that are trained; None: all of them.
      timed: models whose steps are timed for the estimate.
      processes: runs side by side.
      xla_flags: of the processes that train, for a size of which compiling is most of the cost.
      ask: topology for which the planner estimates it, before anything is trained; then ``--yes``
        has to be given.  Empty: steps are timed here.
    """

    about: str
    shared: Callable[[], config.Config]
    wider: Mapping[str, Any]
    seeds: int
    ablations: tuple[str, ...] | None = None
    timed: tuple[str, ...] = ("dense", "top_2")
    processes: int = 1
    xla_flags: str = ""
    ask: str = ""


def _run(model: dict, **groups: dict) -> config.Config:
    """Settings of a run, whose groups are updated by those that are given."""
    groups.setdefault("checkpoint", {"every_steps": groups["train"]["steps"] // 4 or 1, "keep": 1})
    groups.setdefault("logging", {"tensorboard": False})
    settings = config.to_dict(config.Config())
    settings["model"] |= {name: value for name, value in model.items() if name != "moe"}
    settings["model"]["moe"] |= model.get("moe", {})
    for name, values in groups.items():
        for key, value in values.items():
            inner = settings[name]
            inner[key] = inner[key] | value if isinstance(value, dict) else value
    return config.from_config_dict(settings)


def tiny() -> config.Config:
    """Two narrow layers."""
    return _run(
        {
            "num_layers": 2,
            "width": 32,
            "num_heads": 2,
            "num_kv_heads": 2,
            "head_width": 16,
            "hidden_width": 32,
            "vocab_size": 512,
            "max_seq_len": 64,
            "init_std": 0.1,
            "moe": {"num_experts": 8, "hidden_width": 32},
        },
        loss={"entropy": {"weight": 3e-3}, "chunk_tokens": 512},
        data={"sources": "python", "seq_len": 64, "max_megabytes": 0.3},
        train={"steps": 40, "batch_size": 8, "log_every_steps": 1},
        optimizer={"learning_rate": 5e-3, "warmup_steps": 5},
        checkpoint={"every_steps": 20, "keep": 1},
        evaluation={"max_batches": 6, "sample_tokens": 0, "report": False},
    )


def laptop() -> config.Config:
    """Four layers of width 192 with the paper's 16 experts."""
    return _run(
        {
            "num_layers": 4,
            "width": 192,
            "num_heads": 3,
            "num_kv_heads": 3,
            "head_width": 64,
            "hidden_width": 256,
            "vocab_size": 4096,
            "max_seq_len": 256,
            # Narrower than the paper's model by five, so wider draws: 0.02 learns visibly slower.
            "init_std": 0.05,
            "moe": {"num_experts": 16, "hidden_width": 256},
        },
        # The paper's 1e-4 shows after billions of tokens; these runs have half a million.
        loss={"entropy": {"weight": 3e-3}, "chunk_tokens": 512},
        data={"sources": "python", "seq_len": 128, "max_megabytes": 8.0},
        train={"steps": 500, "batch_size": 8, "log_every_steps": 1},
        optimizer={"learning_rate": 2e-3, "warmup_steps": 40},
        evaluation={"max_batches": 40, "sample_tokens": 0},
    )


def gpu() -> config.Config:
    """Twelve layers of width 768: 134M active parameters with one expert, 1.0B in all."""
    return _run(
        {
            "num_layers": 12,
            "width": 768,
            "num_heads": 12,
            "num_kv_heads": 12,
            "head_width": 64,
            "hidden_width": 2048,
            "vocab_size": 32000,
            "max_seq_len": 1024,
            "init_std": 0.01,
            "remat": "elementwise",
            "moe": {"num_experts": 16, "hidden_width": 2048},
        },
        loss={"entropy": {"weight": 1e-3}},
        data={"sources": "python", "seq_len": 1024},
        # 3.9e8 tokens: half an hour at 40 % of an H100's peak (arithmetic, not measured).
        train={"steps": 1500, "batch_size": 256, "microbatches": 8, "log_every_steps": 1},
        optimizer={"learning_rate": 6e-4, "warmup_steps": 100},
        evaluation={"max_batches": 8},
    )


def paper() -> config.Config:
    """The paper's models, data and length; see ``configs/paper``."""
    tokens, length, batch = 100e9, 2048, 1024
    return _run(
        {"remat": "elementwise"},
        data={
            "sources": "jsonl:redpajama/*.jsonl.zst",
            "tokenizer": "redpajama/tokenizer.model",
            "seq_len": length,
        },
        train={"steps": math.ceil(tokens / (length * batch)), "batch_size": batch},
        optimizer={"learning_rate": 3e-4, "warmup_steps": 2000},
        checkpoint={"every_steps": 1000},
        evaluation={"every_steps": 5000},
        logging={"tensorboard": True},
    )


SIZES: dict[str, Size] = {
    "tiny": Size(
        "for tests: a minute, and answers that decide little",
        tiny,
        {"model.hidden_width": 64},
        1,
        ablations=("ablation_base", "ablation_renormalized"),
        timed=("top_2",),
        processes=2,
        xla_flags=CHEAP_COMPILATION,
    ),
    "laptop": Size(
        "half an hour a seed on two cores, half a million tokens a model",
        laptop,
        {"model.hidden_width": 512},
        3,
    ),
    "gpu": Size(
        "half an hour a model on a GPU of 80 GB: 134M active parameters",
        gpu,
        {"model.hidden_width": 4096},
        3,
    ),
    "paper": Size(
        "the paper's own models and 100B tokens a model",
        paper,
        {
            "model.width": 1280,
            "model.num_heads": 20,
            "model.num_kv_heads": 20,
            "model.hidden_width": 3584,
        },
        1,
        ask="h100:8x8",
    ),
}
