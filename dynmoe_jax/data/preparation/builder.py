"""The prepared documents as a TFDS dataset in ArrayRecord."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.preparation.spool import Entry, Spool
from dynmoe_jax.data.sources.document import Document

_LONGEST_SLUG = 60


class Documents(tfds.core.GeneratorBasedBuilder):
    """Texts with their domain and origin; one split per domain and side.

    Args:
      spool: the documents.
      splits: the documents of each split.
      advance: called after each document.
      data_dir: where the dataset is written.
    """

    VERSION = tfds.core.Version("1.0.0")
    # There is nothing to download; looking for a list of checksums would need importlib_resources.
    url_infos: ClassVar[dict] = {}

    def __init__(
        self,
        spool: Spool,
        splits: Mapping[str, list[Entry]],
        advance: Callable[[], None],
        data_dir: Path,
    ):
        self._spool, self._splits, self._advance = spool, splits, advance
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        names = Document._fields
        features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in names})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager) -> dict[str, Iterable]:
        del dl_manager  # nothing is downloaded
        return {name: self._generate_examples(name) for name in self._splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        for entry in self._splits[split]:
            yield entry.index, self._spool.read(entry.index)._asdict()
            self._advance()


def write_dataset(
    directory: Path,
    spool: Spool,
    splits: Mapping[str, list[Entry]],
    advance: Callable[[], None],
) -> Path:
    """Writes the splits below the directory and returns the dataset's own folder there."""
    builder = Documents(spool, splits, advance, data_dir=directory)
    with _silence():
        builder.download_and_prepare()
    return Path(builder.data_dir)


def open_split(dataset: Path, split: str) -> Sequence[dict]:
    """Random access to the examples of a split.

    Raises (also when an example is read):
      DataError: the files are damaged.
    """
    return _Examples(dataset, split)


class _Examples(Sequence):
    """A split, with one sentence for what TFDS and ArrayRecord raise where files are damaged."""

    def __init__(self, dataset: Path, split: str):
        self._dataset = dataset
        with self._sound():
            self._source = tfds.builder_from_directory(dataset).as_data_source(split)
            self._length = len(self._source)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self._length:
            raise IndexError(index)
        with self._sound():
            return self._source[index]

    @contextlib.contextmanager
    def _sound(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # RuntimeError, ValueError and others, by what is damaged
            reason = " ".join(str(error).split())[:150] or type(error).__name__
            raise damaged(self._dataset.parents[1], reason) from error


def damaged(folder: Path, what: str) -> DataError:
    """The error for a preparation that is not as it was written."""
    return DataError(
        f"The prepared data in {folder} is damaged ({what}); delete that folder, and the same "
        "command prepares it anew."
    )


def slugs(domains: Iterable[str]) -> dict[str, str]:
    """A name for each domain that TFDS accepts within the name of a split; all different."""
    found: dict[str, str] = {}
    for domain in sorted(domains):
        slug = re.sub(r"[^a-z0-9]+", "_", domain.lower()).strip("_")[:_LONGEST_SLUG] or "domain"
        taken, number = set(found.values()), 2
        unique = slug
        while unique in taken:
            unique, number = f"{slug}_{number}", number + 1
        found[domain] = unique
    return found


def split_names(slug: str) -> tuple[str, str]:
    """The names of a domain's training and held-out split."""
    return f"train_{slug}", f"heldout_{slug}"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Mutes TFDS, which prints by itself; rich, which draws our progress bar, is let through."""
    tfds.disable_progress_bar()
    void = io.StringIO()
    void.rich_proxied_file = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    with contextlib.redirect_stdout(void):
        yield
