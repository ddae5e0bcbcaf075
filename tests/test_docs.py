"""The documents name what is there."""

import dataclasses
import re
from pathlib import Path

import pytest

from dynmoe_jax import config
from dynmoe_jax.training.logbook import COUNTS, SCALARS
from dynmoe_jax.training.summary import DomainResult, HeldOut, Sample, Summary

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_has_the_two_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "pip install -e . && python train.py --config=configs/quickstart.py" in lines
    assert "pip install -e '.[test]' && pytest" in lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_are_named_exist(page):
    names = config.setting_names()
    text = page.read_text(encoding="utf-8")
    found = set(re.findall(r"config\.((?:[a-z_]+\.)*[a-z_0-9]+)", text)) - {"py"}
    assert not [name for name in found if name.islower() and name not in names]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_linked_exist(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_every_metric_is_explained():
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    fields = [
        field.name for kind in (Summary, HeldOut, Sample) for field in dataclasses.fields(kind)
    ]
    fields += [field.name for field in dataclasses.fields(DomainResult)]
    assert not [
        name for name in (*SCALARS, *COUNTS, *fields) if not re.search(rf"[`.]{name}[`.]", text)
    ]
