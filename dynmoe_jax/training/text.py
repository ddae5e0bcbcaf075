"""The text of one run: prepared documents, and the tokenizer that stays with the run."""

from pathlib import Path

from dynmoe_jax import config
from dynmoe_jax.console import stage
from dynmoe_jax.data import DataError, Prepared, Tokenizer, prepare, train_tokenizer

TOKENIZER_FILE = "tokenizer.model"


def load_text(cfg: config.Config, workdir: Path, begun: bool) -> tuple[Prepared, Tokenizer]:
    """Prepares the sources (or finds them prepared) and loads or trains the tokenizer.

    The tokenizer lies in the run's folder as ``tokenizer.model``: a copy of the file that
    ``config.data.tokenizer`` names, or one trained on the run's own training text.

    Args:
      cfg: all settings.
      workdir: the run's folder.
      begun: a checkpoint was trained with the tokenizer that lies there; otherwise it may be left
        from other settings, and is made anew.

    Raises:
      ConfigError: the tokenizer has more tokens than the model.
      DataError: the sources or the tokenizer cannot be used, or nothing can be held out.
    """
    directory = Path(cfg.data.directory or workdir / "data").expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"config.data.directory={str(directory)!r} cannot be written ({error.strerror}); "
            "name another folder."
        ) from error
    prepared = prepare(cfg.data, directory)
    if not any(len(prepared.open_heldout(domain)) for domain in prepared.domains):
        raise DataError(
            f"config.data.sources={cfg.data.sources!r} gives no two different documents, so none "
            "can be held out for evaluation; split the text into more files or records."
        )
    path = workdir / TOKENIZER_FILE
    if begun:
        return prepared, Tokenizer.load(path)
    if cfg.data.tokenizer:
        tokenizer = Tokenizer.load(Path(cfg.data.tokenizer).expanduser())
        _check_vocabulary(tokenizer, cfg)
        tokenizer.save(path)
    else:
        with stage("Training a tokenizer", unit="tokens") as shown:
            texts = prepared.sample_texts(cfg.data.tokenizer_megabytes)
            tokenizer = train_tokenizer(texts, cfg.model.vocab_size, path)
            shown.advance(tokenizer.vocab_size)
    return prepared, tokenizer


def _check_vocabulary(tokenizer: Tokenizer, cfg: config.Config) -> None:
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise config.ConfigError(
            f"config.model.vocab_size={cfg.model.vocab_size} is smaller than the "
            f"{tokenizer.vocab_size} tokens of {cfg.data.tokenizer}; raise it to at least that."
        )
