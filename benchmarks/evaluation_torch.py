"""The harness's own ``hf`` model, for `benchmarks.evaluation`.

A process of its own: ``python -m benchmarks.evaluation_torch JSON``.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.evaluation_cases import Asked, Case, answers, points, tasks_of
from benchmarks.pretrained import from_pretrained
from benchmarks.worker import serve


def main() -> None:
    """Serves every task with every batch size, and the answers to the last call of each."""
    # What the harness and this project print would be read as answers.
    with contextlib.redirect_stdout(sys.stderr):
        cases = make_cases()
    serve(cases)


def make_cases() -> dict[str, Callable[[], Any]]:
    """By name."""
    given = json.loads(sys.argv[1])
    batch_sizes = given.pop("batch_sizes")
    asked = Asked(**given)
    torch.set_num_threads(asked.threads)
    model = from_pretrained(AutoModelForCausalLM, asked.model, dtype=torch.float32).eval()
    tokenizer = from_pretrained(AutoTokenizer, asked.model)

    def make(batch_size: str) -> Callable[[], HFLM]:
        return lambda: Model(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size if batch_size == "auto" else int(batch_size),
            device="cpu",
            max_length=asked.max_length,
            softmax_dtype=asked.softmax,
        )

    class Model(HFLM):
        max_gen_toks = asked.max_new_tokens

    cases = {
        f"hf_{size}/{name}": Case(make(size), parts, asked.limit)
        for size in batch_sizes
        for name, parts in tasks_of(asked).items()
    }
    results = {"answers": answers, "points": points}
    served = {
        f"{what}/{name}": lambda case=case, read=read: read(case.found)
        for what, read in results.items()
        for name, case in cases.items()
    }
    return {name: quietly(run) for name, run in (cases | served).items()}


def quietly(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run``, printing to stderr."""

    def call() -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            return run()

    return call


if __name__ == "__main__":
    main()
