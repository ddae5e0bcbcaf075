"""The text of one run: prepared documents, and the tokenizer that stays with the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.cluster import agreement
from dynmoe_jax.console import stage
from dynmoe_jax.data import (
    DataError,
    Prepared,
    SentencePieceTokenizer,
    Tokenizer,
    check_unchanged,
    find_tokenizer,
    for_rows,
    kept_tokenizer,
    open_tokenizer,
    prepare,
    remove_tokenizer,
    train_tokenizer,
)
from dynmoe_jax.data.preparation.prepare import source_fingerprint, template_for
from dynmoe_jax.data.tokenizers.vocabulary import token_text
from dynmoe_jax.registry import chosen
from dynmoe_jax.runs.disk import is_seen

TRAINED = SentencePieceTokenizer.name_in_run
"""The file of a tokenizer that was trained here."""


def load_text(
    cfg: config.Config, workdir: Path, position: Mapping[str, Any] | None
) -> tuple[Prepared, Tokenizer]:
    """Prepares the sources (or finds them prepared) and loads or trains the tokenizer.

    Of several processes, process 0 does all of it; the others open what it has made.

    The tokenizer lies in the run's folder, as ``tokenizer.model`` or in ``tokenizer/``: a copy of
    what ``config.data.tokenizer`` names, or one trained on the run's own training text.

    Args:
      cfg: all settings.
      workdir: the run's folder.
      position: in the data, of the checkpoint that the run continues; None in a new run, where a
        tokenizer that lies there may be left from other settings, and is made anew.

    Raises:
      ConfigError: the tokenizer has more tokens than the model, or, where the model comes from
        elsewhere, such a token is certain to be met.
      DataError: the sources or the tokenizer cannot be used, or are not those that the run began
        with, or nothing can be held out.
    """
    if agreement.is_first():
        prepared, tokenizer = _make_text(cfg, workdir, position)
        agreement.broadcast([str(prepared.directory.absolute()), tokenizer.fingerprint])
    else:
        directory, digest = agreement.broadcast(None)
        prepared, tokenizer = _open_text(Path(directory), workdir, digest)
    return prepared, for_rows(tokenizer, cfg.model.vocab_size)


def _open_text(directory: Path, workdir: Path, digest: str) -> tuple[Prepared, Tokenizer]:
    """Opens the data and the tokenizer that process 0 has made."""
    if not is_seen(directory.is_dir):
        raise DataError(
            f"{directory}, where process 0 has prepared the data, is not there; have "
            "config.data.directory name a folder on a file system that all processes share."
        )

    def is_the_same() -> bool:
        return find_tokenizer(workdir) is not None and kept_tokenizer(workdir).fingerprint == digest

    if not is_seen(is_the_same):
        raise DataError(
            f"The tokenizer in {workdir} is not the one that process 0 uses; share the --workdir."
        )
    return Prepared(directory), kept_tokenizer(workdir)


def _make_text(
    cfg: config.Config, workdir: Path, position: Mapping[str, Any] | None
) -> tuple[Prepared, Tokenizer]:
    directory = Path(cfg.data.directory or workdir / "data").expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"config.data.directory={str(directory)!r} cannot be written ({error.strerror}); "
            "name another folder."
        ) from error
    named = open_tokenizer(cfg.data.tokenizer) if position is None and cfg.data.tokenizer else None
    if position is None:
        template = named and template_for(cfg.data, named)
    else:
        # A run that was begun with a template has it with its tokenizer.
        began_with = source_fingerprint(cfg.data) != position["data"] and find_tokenizer(workdir)
        template = template_for(cfg.data, kept_tokenizer(workdir)) if began_with else None
        check_unchanged(cfg.data, directory, position["data"], template)
    prepared = prepare(cfg.data, directory, template)
    if not any(len(prepared.open_heldout(domain)) for domain in prepared.domains):
        raise DataError(
            f"config.data.sources={cfg.data.sources!r} gives no two different documents, so none "
            "can be held out for evaluation; split the text into more files or records."
        )
    if position is not None:
        return prepared, load_tokenizer(workdir, position)
    if named is not None:
        tokenizer = named
        _check_vocabulary(tokenizer, cfg)
        remove_tokenizer(workdir)
        tokenizer.save(workdir / tokenizer.name_in_run)
    else:
        remove_tokenizer(workdir)
        with stage("Training a tokenizer", unit="tokens") as shown:
            texts = prepared.sample_texts(cfg.data.tokenizer_megabytes)
            corruption = chosen(cfg.data, "corruption")
            reserved = corruption.reserved if corruption else ()
            rows = cfg.model.vocab_size
            tokenizer = train_tokenizer(texts, rows, workdir / TRAINED, reserved)
            shown.advance(tokenizer.vocab_size)
    return prepared, tokenizer


def load_tokenizer(workdir: Path, position: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a run was trained with.

    Args:
      workdir: the run's folder.
      position: in the data, of one of its checkpoints; it holds the tokenizer's SHA-256.

    Raises:
      DataError: the file is missing, or another one.
    """
    path = find_tokenizer(workdir)
    lost = "bring back the file that the run was trained with, or start in another --workdir"
    if path is None:
        raise DataError(f"{workdir / TRAINED} is missing; {lost}.")
    tokenizer = kept_tokenizer(workdir)
    if tokenizer.fingerprint != position["tokenizer"]:
        raise DataError(
            f"{path} has changed since the checkpoint was written (SHA-256 "
            f"{tokenizer.fingerprint[:12]}… instead of {position['tokenizer'][:12]}…); {lost}."
        )
    return tokenizer


def _check_vocabulary(tokenizer: Tokenizer, cfg: config.Config) -> None:
    rows = cfg.model.vocab_size
    if tokenizer.vocab_size <= rows:
        return
    if not cfg.train.init_from:
        raise config.ConfigError(
            f"config.model.vocab_size={rows} is smaller than the {tokenizer.vocab_size} tokens of "
            f"{cfg.data.tokenizer}; raise it to at least that."
        )
    # What the model has no row for may never come; but these would, one of them at the very end.
    for token, what in ((tokenizer.bos_id, "begins"), (tokenizer.eos_id, "ends")):
        if token >= rows:
            raise config.ConfigError(
                f"token {token} ({token_text(tokenizer, token)!r}), which {what} every document, "
                f"has no row in the embedding of config.train.init_from={cfg.train.init_from!r}, "
                f"which has {rows} rows; give that model another tokenizer."
            )
    try:
        for_rows(tokenizer, rows).encode(cfg.evaluation.prompt)
    except DataError as error:
        raise config.ConfigError(
            f"config.evaluation.prompt={cfg.evaluation.prompt!r} cannot be read: {error}"
        ) from error
