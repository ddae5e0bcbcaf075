"""Preparation of a dataset from sources: read, cap, hold out, write, and reuse what is there."""

import dataclasses
import functools
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.console import console, stage
from dynmoe_jax.data.chat.template import ChatTemplate, template_of
from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.preparation.abandoned import own_name, remove_abandoned
from dynmoe_jax.data.preparation.builder import (
    damaged,
    open_split,
    slugs,
    split_names,
    write_dataset,
)
from dynmoe_jax.data.preparation.split import Sides, hold_out, keep_within
from dynmoe_jax.data.preparation.spool import Entry, Spool
from dynmoe_jax.data.sources.document import Broken
from dynmoe_jax.data.sources.registry import (
    CONVERSATIONS,
    parse_sources,
    read_documents,
    source_identity,
)

# Raised when the same settings would give other documents than before.
_FORMAT = 1
_SUMMARY = "summary.json"
TEMPLATE = "chat_template"
"""Name of the template's digest in the summary."""

_UNFINISHED = "unfinished-"
_BROKEN_PRINTED = 10
_BROKEN_LISTED = 1000
_MOST_DOMAINS = 1000
_SAMPLED_CHARACTERS = 100_000


@dataclasses.dataclass(frozen=True)
class Amount:
    """Amount of text on one side of a domain, training or held out."""

    documents: int
    bytes: int  # of text in UTF-8


@dataclasses.dataclass(frozen=True)
class BrokenReport:
    """Records of the sources that could not be read.

    Attributes:
      records: how many records are lost.
      share: of the records lost among all.
      examples: the first thousand, as "FILE:LINE: reason".
    """

    records: int
    share: float
    examples: tuple[str, ...]


class Prepared:
    """A complete preparation on disk.

    Attributes:
      directory: where it is.
      fingerprint: of the settings and sources that determine the documents in it.
      content: of the documents themselves; empty in preparations of earlier versions.
      domains: their names, sorted.
      train: the amount of training text by domain.
      heldout: the amount of held-out text by domain; zero where a domain has but one text.
      broken: what could not be read.

    Raises:
      DataError: a file is missing, or has another size than it was written with.  What has changed
        inside of a file is found when it is read: ArrayRecord has checksums.
    """

    def __init__(self, directory: Path):
        summary = read_summary(directory)
        _check_files(directory, summary.get("files", {}))
        self.directory = directory
        self.fingerprint: str = summary["fingerprint"]
        self.content: str = summary.get("content", "")
        self._slugs: dict[str, str] = summary["domains"]
        self.domains: list[str] = sorted(self._slugs)
        self.train = {name: Amount(**amount) for name, amount in summary["train"].items()}
        self.heldout = {name: Amount(**amount) for name, amount in summary["heldout"].items()}
        broken = summary["broken"]
        self.broken = BrokenReport(broken["records"], broken["share"], tuple(broken["examples"]))
        self._dataset = directory / summary["dataset"]
        # TFDS keeps every builder that it has made, for ever (docs/measurements.md: tfds-builder).
        self._open_split = functools.cache(functools.partial(open_split, self._dataset))

    def open_train(self, domain: str) -> Sequence[dict]:
        """Random access to a domain's training examples (``text``, ``domain``, ``origin``)."""
        return self._open(self.train[domain], split_names(self._slugs[domain])[0])

    def open_heldout(self, domain: str) -> Sequence[dict]:
        """Random access to a domain's held-out examples."""
        return self._open(self.heldout[domain], split_names(self._slugs[domain])[1])

    def _open(self, amount: Amount, split: str) -> Sequence[dict]:
        return self._open_split(split) if amount.documents else ()

    def sample_texts(self, megabytes: float) -> Iterator[str]:
        """Training texts up to this many MB, as evenly over the domains as their sizes allow.

        A text that is longer than ``_SAMPLED_CHARACTERS`` comes in parts, which are as good as
        texts to whoever counts words.
        """
        readers = {domain: _in_parts(self.open_train(domain)) for domain in self.domains}
        given = dict.fromkeys(self.domains, 0)
        while readers and sum(given.values()) < megabytes * 1e6:
            domain = min(readers, key=given.__getitem__)
            text = next(readers[domain], None)
            if text is None:
                del readers[domain]
            else:
                given[domain] += len(text.encode())
                yield text


def _in_parts(examples: Sequence[dict]) -> Iterator[str]:
    for example in examples:
        text = example["text"].decode()
        for start in range(0, len(text), _SAMPLED_CHARACTERS):
            yield text[start : start + _SAMPLED_CHARACTERS]


def prepare(data: config.Data, directory: Path, template: ChatTemplate | None = None) -> Prepared:
    """Reads the sources and writes the dataset, or reuses a complete preparation of the same.

    Args:
      data: the settings.
      directory: where preparations are kept, each in a folder named by its fingerprint.
      template: of conversations, the tokenizer's; None: marks stand before their turns.

    Raises:
      DataError: a source cannot be read, too much of it is broken, or no document is left.
    """
    fingerprint = source_fingerprint(data, template)
    final = directory / fingerprint[:16]
    if (final / _SUMMARY).is_file():
        console.print(f"Reusing the data prepared in {final}", markup=False)
        return Prepared(final)
    directory.mkdir(parents=True, exist_ok=True)
    remove_abandoned(directory, _UNFINISHED)
    # A folder gets its final name only when everything is in it.
    unfinished = directory / own_name(_UNFINISHED)
    unfinished.mkdir()
    try:
        _prepare_in(unfinished, data, template, fingerprint)
        try:
            unfinished.rename(final)
        except OSError:  # another process finished the same preparation in the meantime
            if not (final / _SUMMARY).is_file():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Prepared(final)


def _prepare_in(
    directory: Path, data: config.Data, template: ChatTemplate | None, fingerprint: str
) -> None:
    spool_path = directory / "spool"
    with Spool(spool_path) as spool:
        broken = _read_into(spool, data, template)
        sides = _choose(spool, data)
        names = slugs(sides)
        splits = {}
        for domain, slug in names.items():
            splits.update(zip(split_names(slug), sides[domain], strict=True))
        splits = {name: entries for name, entries in splits.items() if entries}
        total = sum(map(len, splits.values()))
        with stage("Writing documents", total=total, unit="documents") as progress:
            dataset = write_dataset(directory, spool, splits, progress.advance)
    spool_path.unlink()
    summary = {
        "fingerprint": fingerprint,
        "settings": settings_of(data, template),
        "dataset": dataset.relative_to(directory).as_posix(),
        "domains": names,
        "train": {name: _amount(side.train) for name, side in sides.items()},
        "heldout": {name: _amount(side.heldout) for name, side in sides.items()},
        "broken": dataclasses.asdict(broken),
        "content": _content(splits),
        "files": {
            path.relative_to(directory).as_posix(): path.stat().st_size
            for path in sorted(dataset.iterdir())
        },
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (directory / _SUMMARY).write_text(text, encoding="utf-8")


def read_summary(folder: Path) -> dict[str, Any]:
    """Reads the summary that a complete preparation has left in its folder.

    Raises:
      FileNotFoundError: there is none.
      DataError: it cannot be read.
    """
    try:
        return json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(folder, f"{_SUMMARY} cannot be read") from error


def _check_files(directory: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        try:
            found = (directory / name).stat().st_size
        except FileNotFoundError as error:
            raise damaged(directory, f"{name} is missing") from error
        if found != size:
            raise damaged(directory, f"{name} has {found:,} bytes instead of {size:,}")


def _content(splits: Mapping[str, Sequence[Entry]]) -> str:
    """Hash of which documents are in which split, and of their order."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        digest.update(json.dumps([name, [(e.hash, e.index) for e in splits[name]]]).encode())
    return digest.hexdigest()


def _read_into(spool: Spool, data: config.Data, template: ChatTemplate | None) -> BrokenReport:
    """Spools all documents and prints what is broken."""
    lost, examples = 0, []
    with stage("Reading documents", unit="documents") as progress:
        for item in read_documents(data, template):
            if isinstance(item, Broken):
                lost += item.records
                if len(examples) < _BROKEN_LISTED:
                    examples.append(f"{item.origin}: {item.reason}")
            else:
                spool.add(item)
                progress.advance()
            if len(spool.entries) > _MOST_DOMAINS:
                raise DataError(
                    f"config.data.domain_field={data.domain_field!r} gives more than "
                    f"{_MOST_DOMAINS} domains; name a field that has few values."
                )
    share = lost / max(lost + len(spool), 1)
    if lost:
        lines = "".join(f"\n  {example}" for example in examples[:_BROKEN_PRINTED])
        more = f"\n  ... and more, listed in the prepared data's {_SUMMARY}"
        more = more if lost > _BROKEN_PRINTED else ""
        console.print(
            f"{lost:,} broken records ({share:.2%}):{lines}{more}", markup=False, soft_wrap=True
        )
    if share > data.max_broken_fraction:
        raise DataError(
            f"{lost:,} of {lost + len(spool):,} records are broken ({share:.2%}, the first is "
            f"{examples[0]}), more than config.data.max_broken_fraction="
            f"{data.max_broken_fraction:g}; repair the files or raise that setting."
        )
    return BrokenReport(lost, share, tuple(examples))


def _choose(spool: Spool, data: config.Data) -> dict[str, Sides]:
    cap_bytes = data.max_megabytes * 1e6 or math.inf
    kept = {name: keep_within(entries, cap_bytes) for name, entries in spool.entries.items()}
    sides = hold_out(
        {name: entries for name, entries in kept.items() if entries}, data.heldout_fraction
    )
    if not any(side.train for side in sides.values()):
        reason = f"at most {data.max_megabytes:g} MB" if len(spool) else "no"
        raise DataError(
            f"config.data.sources={data.sources!r} gives no document to train on "
            f"({len(spool)} read, {reason} text kept per domain); name other sources."
        )
    return sides


def _amount(entries: list[Entry]) -> dict[str, int]:
    return dataclasses.asdict(Amount(len(entries), sum(entry.size for entry in entries)))


def settings_of(data: config.Data, template: ChatTemplate | None = None) -> dict:
    """The settings that influence which documents there are, and the template if one is used."""
    names = ("text_field", "domain_field", "max_megabytes", "heldout_fraction")
    identities = [source_identity(source) for source in parse_sources(data.sources)]
    found = {"sources": identities, **{name: getattr(data, name) for name in names}}
    if template is not None and any(each["kind"] in CONVERSATIONS for each in identities):
        found[TEMPLATE] = template.digest
    return found


def template_for(data: config.Data, tokenizer: object) -> ChatTemplate | None:
    """The chat template that the sources are read with: the tokenizer's, for conversations.

    Raises:
      DataError: what the tokenizer has is none, or the sources cannot be parsed.
    """
    kinds = {source.kind for source in parse_sources(data.sources)}
    return template_of(tokenizer) if kinds & set(CONVERSATIONS) else None


def is_prepared(data: config.Data, directory: Path, template: ChatTemplate | None = None) -> bool:
    """Whether :func:`prepare` would write nothing.

    Raises:
      DataError: a source is not there.
    """
    return (directory / source_fingerprint(data, template)[:16] / _SUMMARY).is_file()


def source_fingerprint(data: config.Data, template: ChatTemplate | None = None) -> str:
    """Fingerprint of everything that determines the documents; cheap, reads only the ends of
    files."""
    content = json.dumps([_FORMAT, settings_of(data, template)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
