"""Real text that every machine has: the Python installation itself.

The standard library and the packages of the running interpreter give three domains: ``code``
(source files), ``prose`` (docstrings and blocks of comments, when they are prose) and ``docs``
(descriptions, licences, READMEs of packages).  A source file gives either code or prose, never
both, so that no held-out prose is part of the training code.

The order is that of a hash of each file's path relative to its root, so a capped reading is an
even sample of the installation, costs what the cap costs, and comes out the same wherever the
installation lies and in whatever order the file system lists it.  Files that don't decode are
left out in silence: test suites ship broken files on purpose.
"""

import email
import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from dynmoe_jax.data.sources.document import Document
from dynmoe_jax.data.sources.prose import is_prose, passages

MAX_DOCUMENT_BYTES = 100_000
# Larger files, and files with longer lines on average, are tables written by a program.
_MAX_FILE_BYTES = 1_000_000
_MAX_MEAN_LINE = 120
# Of the source files, the share (in sixteenths) that gives prose.  Prose is a small part of a
# source file (docs/measurements.md: prose-share), so it needs the larger part to keep up.
_PROSE_SIXTEENTHS = 12

# Folders of other interpreters' caches, of nested roots, and of the project itself, whose text
# changes with every commit.
_SKIPPED_FOLDERS = re.compile(
    r"__pycache__|site-packages|dist-packages|node_modules|dynmoe_jax.*|__editable__.*|\..*"
)
# Written at installation, with absolute paths of this machine inside.
_SKIPPED_FILES = re.compile(r"_sysconfigdata.*|__editable__.*|_virtualenv.*|sitecustomize.*")
_DOCS = re.compile(
    r"METADATA|PKG-INFO|.*\.(rst|md)|(README|LICEN[CS]ES?|COPYING|NOTICE|CHANGES|CHANGELOG|HISTORY"
    r"|NEWS|AUTHORS|CONTRIBUTING)([._-].*)?(?<!\.py)(?<!\.pyi)",
    re.IGNORECASE,
)


def read_python(cap_bytes: float, roots: dict[str, Path] | None = None) -> Iterator[Document]:
    """Yields the documents of the Python installation, without duplicates.

    Args:
      cap_bytes: text to keep per domain, in bytes; infinity for all.
      roots: folders to read, by the name that origins start with; by default those of the
        running interpreter.
    """
    sources, docs = _list_files(installation() if roots is None else roots)
    seen: set[bytes] = set()
    seen_passages: set[bytes] = set()
    prose = [file for file in sources if file[0][0] % 16 < _PROSE_SIXTEENTHS]
    code = [file for file in sources if file[0][0] % 16 >= _PROSE_SIXTEENTHS]
    for domain, files, extract in (
        ("code", code, _code),
        ("docs", docs, _documentation),
        ("prose", prose, lambda name, text: _prose(text, seen_passages)),
    ):
        yield from _read_domain(domain, files, extract, cap_bytes, seen)


def installation() -> dict[str, Path]:
    """The standard library's and the packages' folders of the running interpreter."""
    kinds = {"stdlib": "stdlib", "site-packages": "purelib", "site-packages-native": "platlib"}
    found: dict[str, Path] = {}
    for name, kind in kinds.items():
        path = Path(sysconfig.get_path(kind)).resolve()
        if path.is_dir() and path not in found.values():
            found[name] = path
    return found


_File = tuple[bytes, str, Path]  # hash of the name, name ("stdlib/ast.py"), path


def _list_files(roots: dict[str, Path]) -> tuple[list[_File], list[_File]]:
    """(source files, documentation files) under the roots, each in the order of the hashes."""
    sources, docs = [], []
    for root_name, root in roots.items():
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if not _SKIPPED_FOLDERS.fullmatch(name)]
            inside = Path(root_name, Path(folder).relative_to(root)).as_posix()
            for file in files:
                kind = sources if file.endswith(".py") else docs if _DOCS.fullmatch(file) else None
                if kind is None or _SKIPPED_FILES.fullmatch(file):
                    continue
                name = f"{inside}/{file}"
                digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
                kind.append((digest, name, Path(folder, file)))
    return sorted(sources), sorted(docs)


def _read_domain(
    domain: str,
    files: list[_File],
    extract: Callable[[str, str], str],
    cap_bytes: float,
    seen: set[bytes],
) -> Iterator[Document]:
    left = cap_bytes
    for _, name, path in files:
        text = _load(path)
        text = text and _cut(extract(name, text), MAX_DOCUMENT_BYTES)
        if not text or text.isspace():
            continue
        digest = _digest(text)
        if digest in seen:
            continue
        seen.add(digest)
        size = len(text.encode())
        if size > left:
            text = _cut(text, int(left))
        if text and not text.isspace():
            yield Document(text, domain, name)
        left -= size
        if left <= 0:
            return


def _load(path: Path) -> str | None:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            return None
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return None
    return None if "\0" in text else text.removeprefix("\ufeff")


def _code(name: str, text: str) -> str:
    lines = text.count("\n") + 1
    return "" if len(text) > _MAX_MEAN_LINE * lines else text


def _prose(text: str, seen: set[bytes]) -> str:
    """The passages of a source file that no earlier file had (licence headers recur)."""
    fresh = []
    for passage in passages(text):
        digest = _digest(passage)
        if digest not in seen:
            seen.add(digest)
            fresh.append(passage)
    return "\n\n".join(fresh)


def _documentation(name: str, text: str) -> str:
    if name.endswith(("/METADATA", "/PKG-INFO")):
        message = email.message_from_string(text)
        text = message.get_payload() or message.get("Description", "")
    return text if is_prose(text, word_share=0.6) else ""


def _cut(text: str, most: int) -> str:
    """The text up to the last line that ends within ``most`` bytes."""
    encoded = text.encode()
    if len(encoded) <= most:
        return text
    return encoded[: encoded.rfind(b"\n", 0, most) + 1].decode()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
