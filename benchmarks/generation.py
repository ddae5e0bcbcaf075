"""Generation against Hugging Face's ``generate``, on CPU, in float32.

    python -m benchmarks.generation --json=generation.json
    python -m benchmarks.generation --model=SmolLM2-135M-Instruct.Q4_1.gguf

A Llama of SmolLM2-135M's shape with random weights, or the one that ``--model`` names, continues
the same prompts of random tokens by as many tokens, greedily, and none ends early.  ``prompt`` is a
run that writes one token, so what a run takes beyond it is decoding.  ``read`` adds up the weights
once: the least that a step can take.  Of a model that is named, the written tokens are compared.
Needs the extra ``bench``, but with ``--alone``.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.columns import columns
from benchmarks.command import need, run
from benchmarks.machine import pin_threads, with_machine
from benchmarks.timing import Mark, interleave, ratio, show_progress

FASTER = 1.5
WHAT = ("generate", "prompt")
HEADINGS = (
    "batch, what", "ours / theirs, tokens/s [quartiles]", "ours, tokens/s", "theirs", "ours, s",
    "theirs",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama and what is asked of it, for both peers alike."""

    num_layers: int = 30
    width: int = 576
    hidden_width: int = 1536
    num_heads: int = 9
    num_kv_heads: int = 3
    head_width: int = 64
    vocab_size: int = 49152
    rope_theta: float = 100000.0
    model: str = ""
    prompt_tokens: int = 32
    new_tokens: int = 128


SHAPES = {
    "smollm2": Shape(),
    "tiny": Shape(2, 16, 24, 4, 2, 4, 64, prompt_tokens=5, new_tokens=6),
}


def prompts(shape: Shape, batch: int) -> np.ndarray:
    """Token ids [batch, prompt_tokens]."""
    random = np.random.default_rng(0)
    return random.integers(0, shape.vocab_size, (batch, shape.prompt_tokens))


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--model", default="", help="folder, or GGUF file, of a Llama")
    parser.add_argument("--batches", default="1,8", help="sequences written together")
    parser.add_argument("--prompt_tokens", type=int, help="of each sequence")
    parser.add_argument("--new_tokens", type=int, help="of each sequence")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each case that count")
    parser.add_argument("--threads", type=int, default=2, help="cores for every peer")
    parser.add_argument("--alone", action="store_true", help="without the peer")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure here")
    return parser.parse_args(argv)


def our_decoder(shape: Shape):
    """The model that is named, or one of the shape."""
    from flax import nnx

    from dynmoe_jax import config
    from dynmoe_jax.interop import load_hf
    from dynmoe_jax.model import Decoder

    if shape.model:
        return load_hf(shape.model)
    model = config.Model(
        num_layers=shape.num_layers,
        width=shape.width,
        hidden_width=shape.hidden_width,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_width=shape.head_width,
        vocab_size=shape.vocab_size,
        rope_theta=shape.rope_theta,
        tie_embeddings=True,
        init_std=0.02,
        dtype="float32",
        moe=config.MoE(every_n_layers=0),
    )
    return Decoder(model, rngs=nnx.Rngs(0))


def our_cases(decoder, shape: Shape, batches: list[int]):
    """(seconds of our runs by ``ours/batch/what`` and of reading all weights once, tokens written
    last by batch)."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dynmoe_jax.inference.generate import Generator
    from dynmoe_jax.inference.sampling import Sampling

    generator = Generator(decoder)
    last: dict[int, list[list[int]]] = {}

    def run(batch: int, new_tokens: int) -> float:
        begin = time.perf_counter()
        written = generator.write(
            prompts(shape, batch),
            [new_tokens] * batch,
            Sampling(temperature=0.0),
            vocab_size=shape.vocab_size,
            stop_ids=[],
        )
        taken = time.perf_counter() - begin
        assert all(len(continuation.ids) == new_tokens for continuation in written)
        if new_tokens > 1:
            last[batch] = [continuation.ids.tolist() for continuation in written]
        return taken

    weights = jax.tree.leaves(nnx.split(decoder)[1])
    add_up = jax.jit(lambda weights: sum(jnp.sum(leaf) for leaf in weights))

    def read() -> float:
        begin = time.perf_counter()
        add_up(weights).block_until_ready()
        return time.perf_counter() - begin

    tokens = {"generate": shape.new_tokens, "prompt": 1}
    cases = {
        f"ours/{batch}/{what}": lambda batch=batch, n=n: run(batch, n)
        for batch in batches
        for what, n in tokens.items()
    }
    return cases | {"read": read}, last


def same_tokens(ours: list[list[int]], theirs: list[list[int]]) -> tuple[int, int]:
    """(tokens before the first that differs, tokens), summed over sequences."""
    pairs = [zip(one, two, strict=True) for one, two in zip(ours, theirs, strict=True)]
    same = [sum(np.cumprod([a == b for a, b in pair])) for pair in pairs]
    return int(sum(same)), sum(map(len, ours))


def step_over_read(seconds, shape: Shape, batch: int):
    """What a step of decoding takes, over reading all weights once."""
    steps = seconds[f"ours/{batch}/generate"] - seconds[f"ours/{batch}/prompt"]
    return ratio(steps / (shape.new_tokens - 1), seconds["read"])


def marks(seconds) -> list[Mark]:
    """The rates of whole runs, ours over theirs."""
    found = []
    for name in seconds:
        peer, _, case = name.partition("/")
        if peer == "theirs" and case.endswith("generate"):
            value = ratio(seconds[name], seconds[f"ours/{case}"])
            batch = case.partition("/")[0]
            found.append(Mark(f"tokens/s, batch {batch}", FASTER, value, at_least=True))
    return found


def table(seconds, shape: Shape, batches: list[int]) -> str:
    """What a person reads."""
    rows = [HEADINGS]
    for batch in batches:
        for what in WHAT:
            ours = seconds[f"ours/{batch}/{what}"]
            theirs = seconds.get(f"theirs/{batch}/{what}")
            # Of a prompt the tokens that it has, not the one that it is answered with.
            tokens = batch * (shape.new_tokens if what == "generate" else shape.prompt_tokens)
            over = str(ratio(theirs, ours)) if theirs is not None else "-"
            taken = [ours] if theirs is None else [ours, theirs]
            rates = [f"{tokens / np.nanmedian(s):,.1f}" for s in taken]
            medians = [f"{np.nanmedian(s):.3f}" for s in taken]
            missing = ["-"] * (2 - len(taken))
            rows.append((f"{batch}, {what}", over, *rates, *missing, *medians, *missing))
    return "\n".join(columns(rows))


def main(argv: list[str]) -> dict:
    """Measures, prints table and marks, writes the JSON and returns what it holds."""
    flags = parse(argv)
    if not flags.alone:
        need("bench")
    pin_threads(flags.threads)
    from benchmarks.worker import Worker

    changes = {"prompt_tokens": flags.prompt_tokens, "new_tokens": flags.new_tokens}
    shape = dataclasses.replace(SHAPES[flags.shape], **{k: v for k, v in changes.items() if v})
    batches = [int(batch) for batch in flags.batches.split(",")]
    if flags.model:
        shape = dataclasses.replace(shape, model=flags.model)
    decoder = our_decoder(shape)
    # The prompts are of tokens that the model has.
    shape = dataclasses.replace(shape, vocab_size=decoder.config.vocab_size)
    cases, written = our_cases(decoder, shape, batches)
    worker = None
    if not flags.alone:
        asked = {"shape": dataclasses.asdict(shape), "batches": batches, "threads": flags.threads}
        worker = Worker.of_module("benchmarks.generation_torch", json.dumps(asked))
        theirs = [name for name in worker.names if name.startswith("theirs/")]
        cases |= {name: lambda name=name: worker.seconds(name) for name in theirs}
    seconds = interleave(cases, flags.rounds, show_progress(flags.rounds))
    same = {}
    if worker:
        if flags.model:
            given = {batch: worker.seconds(f"written/{batch}") for batch in batches}
            same = {batch: same_tokens(written[batch], given[batch]) for batch in batches}
        worker.close()

    found = marks(seconds)
    of_read = {batch: step_over_read(seconds, shape, batch) for batch in batches}
    lines = [table(seconds, shape, batches), ""]
    lines += [f"a step of {b} over reading the weights once: {r}" for b, r in of_read.items()]
    lines += [f"the same tokens, batch {b}: {n} of {of}" for b, (n, of) in same.items()]
    print("\n".join([*lines, "", "marks", *map(str, found)]))
    result = {
        "shape": dataclasses.asdict(shape),
        "step_over_read": {str(b): dataclasses.asdict(r) for b, r in of_read.items()},
        "same_tokens": {str(b): counts for b, counts in same.items()},
        "marks": [dataclasses.asdict(mark) for mark in found],
        "seconds": {name: list(values) for name, values in seconds.items()},
    }
    return with_machine("benchmarks.generation", result, flags.json)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
