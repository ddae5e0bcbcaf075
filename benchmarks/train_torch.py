"""Whole training steps of Hugging Face's Mixtral in PyTorch, for `benchmarks.train_step`.

A process of its own: ``python -m benchmarks.train_torch JSON``.
"""

import json
import resource
import sys
import time

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.train_cases import Preset, draw_tokens, preset_of, settings
from benchmarks.train_cases import cases as our_cases
from benchmarks.worker import serve


def make_model(preset: Preset, top_k: int, implementation: str) -> MixtralForCausalLM:
    """A Mixtral of the preset's shape, with its balance loss on."""
    model = preset.model
    shape = MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.width,
        intermediate_size=model.moe.hidden_width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_width,
        num_local_experts=model.moe.num_experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=model.max_seq_len,
        initializer_range=model.init_std,
        output_router_logits=True,
        use_cache=False,
        attn_implementation="sdpa",
        experts_implementation=implementation,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM(shape).train()


class TorchCase:
    """One Mixtral with its AdamW; a case for timing."""

    def __init__(self, preset: Preset, top_k: int, implementation: str):
        self.model = make_model(preset, top_k, implementation)
        ours = settings(preset, our_cases(preset)["top_2"]).optimizer
        # The fused form is the fastest one that PyTorch has.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=ours.learning_rate,
            betas=(ours.b1, ours.b2),
            weight_decay=ours.weight_decay,
            fused=True,
        )
        self.clip_norm = ours.clip_norm
        # The model moves the labels by one itself; ours gets L + 1 tokens and predicts L.
        self.tokens_BL = torch.from_numpy(draw_tokens(preset)[:, :-1]).long()

    def __call__(self) -> float:
        """Takes one step; seconds."""
        begin = time.perf_counter()
        self.model(input_ids=self.tokens_BL, labels=self.tokens_BL).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - begin


class PeakMemory:
    """The most memory that this process has held, in bytes; asked for like a case."""

    def __call__(self) -> float:
        """Bytes (``ru_maxrss`` counts KiB on Linux, bytes on macOS)."""
        unit = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def main() -> None:
    """Serves the case that the JSON in the first argument asks for."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    preset = preset_of(asked["preset"])
    implementation = asked["method"].removeprefix("hf_")
    case = TorchCase(preset, asked["top_k"], implementation)
    serve({asked["method"]: case, "peak_bytes": PeakMemory()})


if __name__ == "__main__":
    main()
