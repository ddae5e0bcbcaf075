"""The command line of generation; every mistake is one sentence."""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dynmoe_jax.command_line import free_settings
from dynmoe_jax.config import ConfigError
from dynmoe_jax.data.sources.files import shown
from dynmoe_jax.fields import walk
from dynmoe_jax.inference.prompts import check_text, read_prompts
from dynmoe_jax.inference.sampling import Sampling

_ABOUT = """Continues texts with a trained model.

  python -m dynmoe_jax.inference --workdir=runs/quickstart --prompt="def main("

Without a prompt, on a terminal, it asks for one after another; Ctrl-D ends it.
--config.model.NAME=VALUE changes what is no part of the model, such as the experts per token of a
router that leaves them open."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the command.

    Attributes:
      workdir: folder of the run.
      settings: other values of free settings of the model, by dotted path.
      best: take the checkpoint with the lowest held-out loss.
      prompts: texts to continue; None to ask for them.
      sampling: how tokens are drawn.
      chat: prompts are what a user says, in the form of conversations that the model was taught.
      system: what stands before every conversation.
      stops: strings that end a text.
      num_samples: texts for each prompt.
      batch_size: prompts computed together.
      begin_with_bos: whether BOS stands before a prompt; None: as the tokenizer says.
      stream: show a text as it grows.
      show_experts: show how many experts each token used.
      json: where to write everything.
    """

    workdir: Path
    settings: dict[str, str]
    best: bool
    prompts: list[str] | None
    sampling: Sampling
    chat: bool
    system: str
    stops: tuple[str, ...]
    num_samples: int
    batch_size: int
    begin_with_bos: bool | None
    stream: bool
    show_experts: bool
    json: Path | None


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(f"{message}; see --help.")


def parse(argv: Sequence[str], *, interactive: bool) -> Arguments:
    """Reads a command line.

    Args:
      argv: without the program's name.
      interactive: somebody can be asked for prompts.

    Raises:
      ConfigError: a flag is unknown, its value cannot be, or there is nothing to continue.
    """
    parser = _parser()
    settings, argv = free_settings(argv)
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        raise _unknown(parser, unknown[0])
    names = [path for path, _, _ in walk(Sampling())]
    sampling = Sampling(**{name: getattr(flags, name) for name in names})
    for name in ("num_samples", "batch_size"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name}={getattr(flags, name)} must be at least 1.")
    if "" in flags.stop:
        raise ConfigError("--stop='' would end every text at once; give a string.")
    for name in ("prompt", "stop"):
        for text in getattr(flags, name):
            check_text(text, f"--{name}='{shown(text)}'")
    prompts = list(flags.prompt)
    if flags.prompts_file:
        prompts += read_prompts(Path(flags.prompts_file).expanduser())
    if not prompts and not interactive:
        raise ConfigError(
            "there is nothing to continue: give --prompt=TEXT or --prompts_file=FILE, or start in "
            "a terminal to be asked."
        )
    if not prompts and flags.json:
        raise ConfigError(f"--json={flags.json} needs --prompt or --prompts_file.")
    if flags.system and not flags.chat:
        raise ConfigError(f"--system='{shown(flags.system)}' has no effect without --chat; add it.")
    check_text(flags.system, f"--system='{shown(flags.system)}'")
    if (flags.stream or not prompts) and flags.num_samples > 1:
        raise ConfigError(
            f"--num_samples={flags.num_samples} does not go with a text that is shown as it grows; "
            "leave out --stream and give a --prompt."
        )
    return Arguments(
        workdir=Path(flags.workdir).expanduser(),
        settings=settings,
        best=flags.best,
        prompts=prompts or None,
        sampling=sampling,
        chat=flags.chat,
        system=flags.system,
        stops=tuple(flags.stop),
        num_samples=flags.num_samples,
        batch_size=flags.batch_size,
        begin_with_bos=flags.begin_with_bos,
        stream=flags.stream,
        show_experts=flags.show_experts,
        json=Path(flags.json).expanduser() if flags.json else None,
    )


def _unknown(parser: argparse.ArgumentParser, argument: str) -> ConfigError:
    name = argument.split("=")[0]
    if not name.startswith("-"):
        return ConfigError(f"{argument!r} is no flag; a text to continue is --prompt={argument!r}.")
    flags = [flag for action in parser._actions for flag in action.option_strings]
    near = difflib.get_close_matches(re.sub("^-+", "--", name), flags, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "see --help."
    return ConfigError(f"{name} is not a flag; {hint}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m dynmoe_jax.inference",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="folder of the run")
    add("--best", action="store_true", help="the checkpoint with the lowest held-out loss")
    text = parser.add_argument_group("what to continue").add_argument
    text("--prompt", action="append", default=[], metavar="TEXT", help="may be given repeatedly")
    text("--prompts_file", metavar="FILE", help="a prompt on each line; or .jsonl[.gz|.zst]")
    text("--chat", action="store_true", help="prompts are said by a user; the model answers")
    text("--system", default="", metavar="TEXT", help="stands before conversations of --chat")
    text("--num_samples", type=int, default=1, metavar="N", help="texts for each prompt (1)")
    text("--batch_size", type=int, default=8, metavar="N", help="prompts computed together (8)")
    shown = "put BOS before a prompt; by default as the tokenizer says"
    text("--begin_with_bos", action=argparse.BooleanOptionalAction, help=shown)
    draw = parser.add_argument_group("how").add_argument
    for name, field, default in walk(Sampling()):
        shown = f"{field.metadata['help']} ({default})".replace("%", "%%")
        draw(f"--{name}", type=field.type, default=default, metavar="N", help=shown)
    draw("--stop", action="append", default=[], metavar="TEXT", help="ends a text; repeatable")
    out = parser.add_argument_group("what to show").add_argument
    out("--stream", action="store_true", help="show a text as it grows")
    shown = "how many experts each token used: by colour, or by numbers where there are no colours"
    out("--show-experts", "--show_experts", action="store_true", help=shown)
    shown = "write texts, tokens, and experts by token and layer here"
    out("--json", metavar="FILE", help=shown)
    return parser
