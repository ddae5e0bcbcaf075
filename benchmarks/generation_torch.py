"""Hugging Face's ``generate``, for `benchmarks.generation`.

A process of its own: ``python -m benchmarks.generation_torch JSON``.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.generation import WHAT, Shape, prompts
from benchmarks.pretrained import from_pretrained
from benchmarks.worker import serve


def make_model(shape: Shape) -> LlamaForCausalLM:
    """The model that is named, or a Llama of the shape with random weights; float32."""
    if shape.model:
        model = from_pretrained(AutoModelForCausalLM, shape.model, dtype=torch.float32).eval()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, name, None)
            setattr(model.generation_config, name, None)
        return model
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.hidden_width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_width,
        rope_theta=shape.rope_theta,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(settings).eval()


class Case:
    """One call of ``generate``; a case for timing."""

    def __init__(self, model: LlamaForCausalLM, shape: Shape, batch: int, new_tokens: int):
        self.model, self.new_tokens = model, new_tokens
        self.ids = torch.from_numpy(prompts(shape, batch))
        self.written: list[list[int]] = []

    @torch.inference_mode()
    def __call__(self) -> float:
        """Seconds."""
        begin = time.perf_counter()
        written = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=self.new_tokens,
            do_sample=False,
        )
        taken = time.perf_counter() - begin
        assert written.shape[1] == self.ids.shape[1] + self.new_tokens
        self.written = written[:, self.ids.shape[1] :].tolist()
        return taken


def main() -> None:
    """Serves the cases that the JSON in the first argument asks for."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    shape = Shape(**asked["shape"])
    model = make_model(shape)
    tokens = dict(zip(WHAT, (shape.new_tokens, 1), strict=True))
    cases = {
        f"theirs/{batch}/{what}": Case(model, shape, batch, n)
        for batch in asked["batches"]
        for what, n in tokens.items()
    }
    written = {
        f"written/{batch}": lambda batch=batch: cases[f"theirs/{batch}/generate"].written
        for batch in asked["batches"]
    }
    serve(cases | written)


if __name__ == "__main__":
    main()
