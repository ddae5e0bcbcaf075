import itertools
import math
import os
import random
import shutil

import pytest

from dynmoe_jax.data.sources import python
from dynmoe_jax.data.sources.prose import is_prose, passages
from dynmoe_jax.data.sources.python import MAX_DOCUMENT_BYTES, read_python

PROSE = (
    "This function reads the whole table and gives back its rows. It is called once per run, "
    "before the first step, and what it returns is kept until the end. "
    "Nobody should change it while the run still lasts."
)
OTHER_PROSE = PROSE.replace("table", "chair").replace("rows", "legs")


def source(number: int, prose: str = PROSE) -> str:
    return f'"""Module {number}. {prose}"""\n\n\ndef f():\n    return {number}\n'


@pytest.fixture
def installation(tmp_path):
    """A small installation with both roots."""
    files = {f"stdlib/m{i}.py": source(i) for i in range(40)}
    files |= {f"site/pkg{i}/__init__.py": source(100 + i) for i in range(40)}
    files["site/pkg0-1.0.dist-info/METADATA"] = f"Name: pkg0\nVersion: 1.0\n\n# pkg0\n\n{PROSE}\n"
    files["site/pkg0-1.0.dist-info/licenses/LICENSE"] = OTHER_PROSE
    files["site/pkg1-1.0.dist-info/licenses/LICENSE.txt"] = OTHER_PROSE
    files["site/pkg1-1.0.dist-info/RECORD"] = PROSE
    files["site/pkg1/README.rst"] = PROSE.replace("table", "lamp")
    for name, text in files.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "lib"


def roots(folder):
    return {"stdlib": folder / "stdlib", "site-packages": folder / "site"}


def read(folder, cap=math.inf):
    return list(read_python(cap, roots(folder)))


def test_the_order_of_the_file_system_does_not_matter(installation, monkeypatch):
    before = read(installation)
    walk = os.walk

    def shuffled(top):
        for folder, folders, files in walk(top):
            random.Random(1).shuffle(folders)
            random.Random(2).shuffle(files)
            yield folder, folders, files

    monkeypatch.setattr(python.os, "walk", shuffled)
    assert read(installation) == before


def test_where_the_installation_lies_does_not_matter(installation, tmp_path):
    before = read(installation)
    shutil.move(installation, tmp_path / "elsewhere")
    assert read(tmp_path / "elsewhere") == before


def test_a_source_file_gives_code_or_prose_but_never_both(installation):
    found = read(installation)
    by_domain = {
        domain: {d.origin for d in found if d.domain == domain} for domain in ("code", "prose")
    }
    assert by_domain["code"]
    assert by_domain["prose"]
    assert not by_domain["code"] & by_domain["prose"]
    assert len(by_domain["code"] | by_domain["prose"]) == 80


def test_identical_texts_come_once(installation):
    for i in range(20):
        (installation / f"stdlib/copy{i}.py").write_text(source(7))
    (installation / "stdlib/again.rst").write_text(OTHER_PROSE)
    texts = [document.text for document in read(installation)]
    assert len(texts) == len(set(texts))


def test_descriptions_licences_and_readmes_are_docs_and_records_are_not(installation):
    docs = {d.origin: d.text for d in read(installation) if d.domain == "docs"}
    assert docs["site-packages/pkg0-1.0.dist-info/METADATA"].startswith("# pkg0")
    assert "site-packages/pkg1/README.rst" in docs
    assert sum(text == OTHER_PROSE for text in docs.values()) == 1
    assert len(docs) == 3


def test_caches_generated_tables_broken_files_and_the_project_itself_are_left_out(installation):
    before = read(installation)
    left_out = {
        "site/pkg1/__pycache__/m.py": source(900),
        "site/dynmoe_jax/data.py": source(901),
        "site/dynmoe_jax-0.1.dist-info/METADATA": f"Name: x\n\n{PROSE} Yes. {PROSE}",
        "site/__editable___pkg_finder.py": source(902),
        "site/big.py": "x = 1\n" * 200_000,
        "site/table.py": f"DATA = '{'0' * 90_000}'\n",
        "site/nul.py": "x = '\0'\n" + source(903),
    }
    for name, text in left_out.items():
        (installation / name).parent.mkdir(parents=True, exist_ok=True)
        (installation / name).write_text(text)
    (installation / "site/latin.py").write_bytes(b"# caf\xe9\n" * 30)
    assert read(installation) == before


def test_long_documents_are_cut_where_a_line_ends(installation):
    for i in range(32):  # some of them on the code side
        (installation / f"stdlib/long{i}.py").write_text(f"value_é = {i}\n" * 10_000)
    long = [d.text for d in read(installation) if "/long" in d.origin]
    assert long
    for text in long:
        assert MAX_DOCUMENT_BYTES - 20 < len(text.encode()) <= MAX_DOCUMENT_BYTES
        assert text.endswith("\n")


def test_a_document_without_a_line_end_to_cut_at_is_left_out(installation):
    before = read(installation)
    (installation / "site/pkg1/NOTICE").write_text(f"{PROSE} " * 1000)
    (installation / "site/pkg1/newsgroups.csv").write_text(f"{PROSE}\nNo document at all.\n")
    assert read(installation) == before


def test_the_cap_holds_per_domain_and_keeps_the_beginning_of_the_order(installation):
    everything = read(installation)
    capped = read(installation, 1500)
    for domain in ("code", "prose", "docs"):
        mine = [document for document in capped if document.domain == domain]
        assert 0 < sum(len(document.text.encode()) for document in mine) <= 1500
        whole = [document for document in everything if document.domain == domain]
        assert mine[:-1] == whole[: len(mine) - 1]
        assert whole[len(mine) - 1].text.startswith(mine[-1].text)  # the last one is cut to fit


def test_a_capped_reading_opens_few_files(installation, monkeypatch):
    opened = []
    load = python._load
    monkeypatch.setattr(python, "_load", lambda path: opened.append(path) or load(path))
    read(installation, 600)
    assert len(opened) < 20


def test_the_real_installation_gives_all_three_domains():
    domains = {}
    for document in itertools.islice(read_python(20_000), 200):
        domains.setdefault(document.domain, []).append(document)
    assert set(domains) == {"code", "prose", "docs"}
    assert all(is_prose(document.text) for document in domains["prose"])


def test_passages_are_docstrings_and_comments_but_not_code_or_headers():
    text = f'''# Copyright 2020 Someone. {PROSE}
# Licensed under some licence. {PROSE}
# All rights reserved.
"""Module.

{PROSE}
"""

x = """not a docstring. {OTHER_PROSE}"""


def f():
    r"""Raw \\d.

    {OTHER_PROSE}
    """
    # {OTHER_PROSE[:90]}
    # {OTHER_PROSE[90:]}
    # And so on.
    return [1, 2, 3]


class C:
    """Short. One."""
'''
    found = list(passages(text))
    assert [passage.split("\n")[0] for passage in found] == [
        "Module.",
        r"Raw \d.",
        OTHER_PROSE[:90],
    ]
    assert found[1].endswith(OTHER_PROSE)


@pytest.mark.parametrize(
    "text",
    [
        "word " * 100,  # no sentence
        "Too short. Really.",
        "x = f(a[1], b[2]); y = {3: 4}. " * 20,
        ">>> f(1)\n12345.678\n" * 30,
    ],
)
def test_what_is_not_prose(text):
    assert not is_prose(text)
