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
from dynmoe_jax.inference.ensemble.members import (
    ESTIMATE,
    FLAG,
    RECORD,
    UNIFORM,
    check_top_k,
    folders_of,
    log_prior_of,
)
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
      workdir: folder of the run; of an ensemble, of its first one.
      members: folders of an ensemble's runs; empty: one model writes.
      prior: of the members, see :func:`.ensemble.members.log_prior_of`.
      ensemble_top_k: members that keep their weight at each token; 0: all.
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
    members: tuple[Path, ...]
    prior: str
    ensemble_top_k: int
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
    members = _members(flags)
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
        workdir=members[0] if members else Path(flags.workdir).expanduser(),
        members=members,
        prior=flags.prior,
        ensemble_top_k=flags.ensemble_top_k,
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


def _members(flags: argparse.Namespace) -> tuple[Path, ...]:
    """Folders of an ensemble's runs; none where --workdir names one run.

    Raises:
      ConfigError: neither is named, or both, or what is asked of an ensemble cannot be.
    """
    if not flags.ensemble:
        for name, default in (("prior", UNIFORM), ("ensemble_top_k", 0)):
            if getattr(flags, name) != default:
                raise ConfigError(f"--{name} has no effect without {FLAG}; leave it out.")
        if flags.workdir is None:
            raise ConfigError("--workdir is missing; name the folder of a run.")
        return ()
    if flags.workdir is not None:
        raise ConfigError(f"{FLAG} does not go with --workdir; leave that out.")
    members = folders_of(flags.ensemble)
    check_top_k(flags.ensemble_top_k, len(members))
    if flags.prior == ESTIMATE:
        raise ConfigError(
            f"--prior={ESTIMATE} needs text; estimate it with python -m dynmoe_jax.evaluation "
            f"{FLAG}={flags.ensemble} --prior={ESTIMATE}, and name its {RECORD} here."
        )
    log_prior_of(flags.prior, len(members))
    return members


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
    add("--workdir", metavar="DIR", help="folder of the run")
    shown = "in place of --workdir: models that write together, weighed by what the text says"
    add(FLAG, default="", metavar="RUN,RUN", help=shown)
    shown = f"of the ensemble's members: {UNIFORM}, or {RECORD} of an evaluation (%(default)s)"
    add("--prior", default=UNIFORM, metavar="PRIOR", help=shown)
    shown = "members with weight at each token; 0: all (%(default)s)"
    add("--ensemble_top_k", type=int, default=0, metavar="K", help=shown)
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
