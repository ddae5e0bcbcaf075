"""Hugging Face's ``generate``, for `benchmarks.generation`.

A process of its own: ``python -m benchmarks.generation_torch JSON``.
"""

import json
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.generation import WHAT, Shape
from benchmarks.worker import serve


def make_model(shape: Shape) -> LlamaForCausalLM:
    """A Llama of the shape, float32, tied embeddings, random weights."""
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
        self.ids = torch.randint(0, shape.vocab_size, (batch, shape.prompt_tokens))

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
        return taken


def main() -> None:
    """Serves the cases that the JSON in the first argument asks for."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    shape = Shape(**asked["shape"])
    model = make_model(shape)
    tokens = dict(zip(WHAT, (shape.new_tokens, 1), strict=True))
    serve(
        {
            f"theirs/{batch}/{what}": Case(model, shape, batch, n)
            for batch in asked["batches"]
            for what, n in tokens.items()
        }
    )


if __name__ == "__main__":
    main()
