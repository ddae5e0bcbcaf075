"""Continues texts with a trained model.

    python -m dynmoe_jax.inference --workdir=runs/quickstart --prompt="def main("
    python -m dynmoe_jax.inference --workdir=runs/quickstart --prompts_file=FILE --json=FILE
    python -m dynmoe_jax.inference --workdir=runs/quickstart --show-experts
    python -m dynmoe_jax.inference --workdir=runs/instructed --chat --prompt="What is your name?"
    python -m dynmoe_jax.inference --ensemble=runs/code,runs/prose --prompt="def main("

Without a prompt, on a terminal, it asks for one after another: Ctrl-C ends a text, Ctrl-D the
program.
"""

import contextlib
import dataclasses
import functools
import sys

from dynmoe_jax.command_line import exit_code
from dynmoe_jax.config import Config, ConfigError
from dynmoe_jax.console import console, stage, warn
from dynmoe_jax.data import DataError, Tokenizer
from dynmoe_jax.data.chat.conversation import ASSISTANT
from dynmoe_jax.inference.arguments import Arguments, parse
from dynmoe_jax.inference.chat import Chat
from dynmoe_jax.inference.effort import Scale, legend, print_effort
from dynmoe_jax.inference.ensemble.generate import Ensemble
from dynmoe_jax.inference.ensemble.members import check_one_tokenizer, log_prior_of
from dynmoe_jax.inference.records import as_record
from dynmoe_jax.inference.writer import Writer, Written
from dynmoe_jax.model import Decoder
from dynmoe_jax.runs.compilation import compiled_programs_kept
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.formatting import printable
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.runs.records import to_json, write_atomically


def main() -> int:
    """The command; returns its exit code."""

    def program() -> int:
        asked = parse(sys.argv[1:], interactive=sys.stdin.isatty())
        with stage("Loading the model"):
            cfg, decoder, tokenizer = _loaded(asked)
        chat = Chat(tokenizer, asked.system) if asked.chat else None
        begin_with_bos = asked.begin_with_bos
        if chat is not None and begin_with_bos is None:
            begin_with_bos = chat.begins_with_bos
        writer = Writer(
            decoder,
            tokenizer,
            asked.sampling,
            (*asked.stops, *(chat.stops if chat else ())),
            begin_with_bos=begin_with_bos,
        )
        if chat is not None and asked.prompts is not None:
            prompts = [chat.prompt([("user", prompt)]) for prompt in asked.prompts]
            asked = dataclasses.replace(asked, prompts=prompts)
        models = decoder.members if isinstance(decoder, Ensemble) else [decoder]
        if asked.show_experts and not any(model.config.num_moe_layers for model in models):
            warn("--show-experts has nothing to show: the model is dense.")
        with compiled_programs_kept(cfg.train, asked.workdir):
            if asked.prompts is None:
                _converse(writer, asked, chat)
            else:
                _write_all(writer, asked)
        return 0

    return exit_code(program, (DataError, CheckpointError))


def _loaded(asked: Arguments) -> tuple[Config, Decoder | Ensemble, Tokenizer]:
    """(settings, model, tokenizer) of the run, or of an ensemble the settings of its first one."""
    load = functools.partial(load_run, best=asked.best, settings=asked.settings)
    if not asked.members:
        return load(asked.workdir)
    settings, decoders, tokenizers = zip(*map(load, asked.members), strict=True)
    check_one_tokenizer(asked.members, [tokenizer.fingerprint for tokenizer in tokenizers])
    log_prior_J = log_prior_of(asked.prior, len(decoders))
    # The one that knows fewest ids: texts with others are refused.
    tokenizer = min(tokenizers, key=lambda tokenizer: tokenizer.vocab_size)
    return settings[0], Ensemble(decoders, log_prior_J, asked.ensemble_top_k), tokenizer


def _write_all(writer: Writer, asked: Arguments) -> None:
    """Continues all prompts, shows them, and writes the records asked for."""
    if asked.stream:
        texts = [_streamed(writer, prompt, asked) for prompt in asked.prompts]
    else:
        texts = _in_batches(writer, asked)
        _show(texts, asked)
    _print_speed(writer)
    if asked.json is not None:
        records = [as_record(written) for written in texts]
        write_atomically(asked.json, to_json(records, indent=2) + "\n")
        console.print(f"Wrote {asked.json}", markup=False, soft_wrap=True)


def _in_batches(writer: Writer, asked: Arguments) -> list[list[Written]]:
    """The texts of all prompts, computed in batches of prompts of like length."""
    for prompt in asked.prompts:
        writer.check(prompt)  # before any is computed
    order = sorted(range(len(asked.prompts)), key=lambda i: len(asked.prompts[i]))
    texts: dict[int, list[Written]] = {}
    with stage("Writing", total=len(order), unit="prompts") as shown:
        for first in range(0, len(order), asked.batch_size):
            batch = order[first : first + asked.batch_size]
            written = writer.write([asked.prompts[i] for i in batch], asked.num_samples)
            texts.update(zip(batch, written, strict=True))
            shown.advance(len(batch))
    return [texts[i] for i in range(len(order))]


def _show(texts: list[list[Written]], asked: Arguments) -> None:
    scale = Scale.of([written for samples in texts for written in samples])
    in_shades = asked.show_experts and scale is not None
    if in_shades:
        console.print(legend(console, scale))
    for written in (written for samples in texts for written in samples):
        console.print()
        if in_shades:
            print_effort(console, written, scale)
        else:
            console.print(printable(written.prompt), style="bold", end="", markup=False)
            console.print(printable(written.text), markup=False, soft_wrap=True)
    console.print()


def _streamed(
    writer: Writer, prompt: str, asked: Arguments, show_prompt: bool = True
) -> list[Written]:
    """Continues one prompt; the text is shown as it grows."""

    def show(text: str) -> None:
        console.print(printable(text), end="", markup=False, soft_wrap=True)

    if show_prompt:
        console.print(printable(prompt), style="bold", end="", markup=False, soft_wrap=True)
    texts = writer.write([prompt], on_text=show)[0]
    console.print("\n")
    scale = Scale.of(texts)
    if asked.show_experts and scale is not None:
        console.print(legend(console, scale))
        print_effort(console, texts[0], scale)
        console.print()
    return texts


def _converse(writer: Writer, asked: Arguments, chat: Chat | None) -> None:
    """Continues or answers what is typed, until there is no more."""
    said: list[tuple[str, str]] = []
    with contextlib.suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  (arrow keys and history, for input)
    what = "the beginning of a text" if chat is None else "what you want to say"
    console.print(f"Type {what}. Ctrl-C ends a text, Ctrl-D the program.")
    while True:
        try:
            # Not console.input: readline has to know of the prompt, or it deletes it.
            typed = input("> ")
            if chat is None:
                _streamed(writer, typed, asked)
            else:
                asks = [*said, ("user", typed)]
                (answer,) = _streamed(writer, chat.prompt(asks), asked, show_prompt=False)
                said = [*asks, (ASSISTANT, answer.text)]
            _print_speed(writer)
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:  # ends this text, or this line, not the conversation
            console.print("\n")
        except UnicodeDecodeError:
            warn("That line is not UTF-8; type it again.")
        except (ConfigError, DataError) as error:
            warn(str(error))


def _print_speed(writer: Writer) -> None:
    speed = writer.generator.speed
    console.print(
        f"{speed.prompt_tokens:,} tokens of prompts read in {speed.prompt_s:.1f} s, "
        f"{speed.written_tokens:,} more written in {speed.writing_s:.1f} s: "
        f"{speed.tokens_per_second:,.1f} tokens/s (and {speed.compile_s:.1f} s of compiling)"
    )


if __name__ == "__main__":
    sys.exit(main())
