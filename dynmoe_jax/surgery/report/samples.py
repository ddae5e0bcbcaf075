"""Texts that both models write from the same beginnings of held-out documents."""

from collections.abc import Sequence
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.console import stage
from dynmoe_jax.data import Tokenizer
from dynmoe_jax.data.sources.document import well_formed
from dynmoe_jax.inference.sampling import Sampling
from dynmoe_jax.inference.writer import Writer, Written
from dynmoe_jax.model import Decoder
from dynmoe_jax.runs.load import OpenedRun
from dynmoe_jax.surgery.measuring.text import Text
from dynmoe_jax.surgery.request import AUTO, DEFAULT, MOST_PARAMETERS, Job
from dynmoe_jax.surgery.size import size_of

_PROMPT_TOKENS, _TOKENS = 24, 40


def samples_of(job: Job, result: OpenedRun, text: Text) -> dict[str, Any]:
    """Texts that both models write, greedily; one of them is in memory at a time.

    Args:
      job: what was asked for.
      result: what was made.
      text: whose held-out documents give the beginnings.

    Returns:
      ``texts``, each with ``prompt``, ``before`` and ``after``; or none, and ``left_out``: why.
    """
    models = [job.parents[0].config, job.cfg]
    if reason := left_out(job.asked.options.samples, models):
        return {"texts": [], "left_out": reason}
    count = DEFAULT if job.asked.options.samples == AUTO else job.asked.options.samples
    room = min(cfg.model.max_seq_len for cfg in models)
    tokens = min(_TOKENS, room // 2)
    prompts = _beginnings(text, count, min(_PROMPT_TOKENS, room - tokens - 1))
    with stage("Writing samples", 2, "models") as shown:
        sides = []
        for make in (job.parents[0].decoder, result.decoder):
            sides.append(_written(make(), text.tokenizer, prompts, tokens))
            shown.advance()
    texts = [
        {"prompt": before.prompt, "before": _told(before), "after": _told(after)}
        for before, after in zip(*sides, strict=True)
    ]
    return {"texts": texts, "left_out": ""}


def left_out(count: int, models: Sequence[config.Config]) -> str:
    """Says why there are no samples; empty where there are some."""
    if not count:
        return "--samples=0: none were asked for."
    for cfg in models:
        if cfg.model.looks_ahead:
            return cfg.model.looks_ahead
    if count == AUTO and not models[0].evaluation.sample_tokens:
        return "config.evaluation.sample_tokens=0 of --from: none; --samples=N asks for some."
    largest = max(size_of(cfg).parameters for cfg in models)
    if count == AUTO and largest > MOST_PARAMETERS:
        return (
            f"A model has {largest / 1e6:,.0f}M parameters, more than {MOST_PARAMETERS / 1e6:.0f}M,"
            f" and to write it must be in memory as a whole; --samples={DEFAULT} asks for it."
        )
    return ""


def _beginnings(text: Text, count: int, tokens: int) -> list[str]:
    """Beginnings of held-out documents, of all domains in turn."""
    readers = [text.prepared.open_heldout(name) for name in text.prepared.domains]
    documents = [
        reader[i]["text"].decode() for i in range(count) for reader in readers if i < len(reader)
    ]
    encoded = [text.tokenizer.encode(document)[: max(1, tokens)] for document in documents[:count]]
    return [well_formed(text.tokenizer.decode(ids)) for ids in encoded]


def _written(
    decoder: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], tokens: int
) -> list[Written]:
    sampling = Sampling(max_tokens=tokens, temperature=0.0)
    # Of a prompt cut within a character, decoding and encoding may make more tokens.
    most = max(len(tokenizer.encode(prompt)) for prompt in prompts)
    room = max(decoder.config.max_seq_len, most + tokens + 1)
    writer = Writer(decoder, tokenizer, sampling, room=room, copy_layers=False)
    return [texts[0] for texts in writer.write(prompts)]


def _told(written: Written) -> dict[str, Any]:
    """Text, and its pieces with the experts that each used; no pieces of a dense model."""
    pieces = zip(written.pieces, written.experts_n, strict=False)
    return {"text": written.text, "pieces": [list(piece) for piece in pieces]}
