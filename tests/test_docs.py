"""The documents name what is there."""

import ast
import dataclasses
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

from dynmoe_jax import command_line, config, registry
from dynmoe_jax.mesh.axes import batch_devices
from dynmoe_jax.mesh.make_mesh import check_divides, mesh_shape
from dynmoe_jax.registry import LOSSES, ROUTERS
from dynmoe_jax.runs.summary import DomainResult, HeldOut, Sample, Summary
from dynmoe_jax.training.log.metric_logger import COUNTS, SCALARS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MEASUREMENTS = ROOT / "docs" / "measurements.md"
SOURCES = [
    ROOT / "train.py",
    *(
        path
        for folder in ("dynmoe_jax", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".h", ".cc")
    ),
]


def test_readme_has_the_two_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "pip install -e . && python train.py --config=configs/quickstart.py" in lines
    assert "pip install -e '.[test]' && pytest" in lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_are_named_exist(page):
    names = {path for path, _, _ in config.walk(config.Config())}
    names |= {path[:dot] for path in names for dot, letter in enumerate(path) if letter == "."}
    text = page.read_text(encoding="utf-8")
    found = set(re.findall(r"config\.((?:[a-z_]+\.)*[a-z_0-9]+)", text)) - {"py", "json"}
    # The page's own code registers some.
    own = re.findall(r"""^@[A-Z]+\.register\("(\w+)"\)""", text, re.MULTILINE)
    found = {name for name in found if not set(name.split(".")) & set(own)}
    assert not [name for name in found if name.islower() and name not in names]


def test_every_page_and_notebook_is_found_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [*PAGES[1:], *(ROOT / "notebooks").glob("*.ipynb"), ROOT / "benchmarks" / "RESULTS.md"]
    links = [f"]({page.relative_to(ROOT).as_posix()})" for page in pages]
    assert not [link for link in links if link not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_linked_exist(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_tour_links_definitions_that_are_there():
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    links = re.findall(r"\[`([^`]+)`\]\(\.\./([^)]+)\)", text)
    assert 20 <= len({file for _, file in links}) <= 26  # 25, and one to look further
    for name, file in links:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        if name != file:
            for part in name.split("."):
                found = [node for node in tree.body if getattr(node, "name", None) == part]
                assert found, f"{name} is not in {file}"
                tree = found[0]


def test_every_metric_is_explained():
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    fields = [
        field.name for kind in (Summary, HeldOut, Sample) for field in dataclasses.fields(kind)
    ]
    fields += [f"{name}_loss" for name in LOSSES]
    fields += [field.name for field in dataclasses.fields(DomainResult)]
    assert not [
        name for name in (*SCALARS, *COUNTS, *fields) if not re.search(rf"[`.]{name}[`.]", text)
    ]


def test_every_registered_kind_is_listed():
    text = (ROOT / "docs" / "routers.md").read_text(encoding="utf-8")
    rows = [
        f"| {kinds.family} | `{name}` | {kind.__doc__.splitlines()[0].rstrip('.')} |"
        for kinds in vars(registry).values()
        if isinstance(kinds, registry.Registry) and kinds is not ROUTERS
        for name, kind in kinds.items()
    ]
    missing = [row.replace("``", "`") for row in rows if row.replace("``", "`") not in text]
    assert not missing, "\n".join(missing)


def presets() -> dict[str, list[str]]:
    """Config files of models that stay small, by the router that they choose."""
    found = {}
    for path in [ROOT / "configs/quickstart.py", *sorted((ROOT / "configs/routers").glob("*.py"))]:
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        router = config.from_config_dict(module.get_config()).model.moe.router
        link = f"[{path.stem}](../{path.relative_to(ROOT).as_posix()})"
        found.setdefault(router, []).append(link)
    return found


def test_every_router_has_its_row():
    """Whatever the registry knows of a router stands in its row; the formula is its author's."""
    lines = (ROOT / "docs" / "routers.md").read_text(encoding="utf-8").splitlines()
    known, wrong = presets(), []
    for name, kind in ROUTERS.items():
        router = kind()
        words = {True: "yes", False: "no"}
        causal = words[router.causal]
        if router.causal and not (router.causal_in_training and router.group == "token"):
            causal = "at inference"
        states = ", ".join(f"`{part}`" for part in router.layer_state(64, 16)) or "–"
        source = inspect.getsource(inspect.getmodule(kind))
        papers = ", ".join(dict.fromkeys(re.findall(r"arXiv (\d{4}\.\d{5})", source))) or "–"
        row = [
            f"`{name}`",
            kind.__doc__.splitlines()[0].rstrip(".").replace("``", "`"),
            "FORMULA",
            states,
            str(router.bounds(16).slots),
            causal,
            papers,
            ", ".join(known.get(name, ["–"])),
        ]
        found = [
            line.strip("| ").split(" | ") for line in lines if line.startswith(f"| `{name}` |")
        ]
        cells = found[0] if found else []
        # Behind a state may stand, in parentheses, that of other settings; of presets, one will do.
        same = len(cells) == len(row) and all(
            wanted == cell
            or (i == 2 and cell not in ("", "FORMULA"))
            or (i == 3 and cell.startswith(f"{wanted} ("))
            or (i == 7 and set(cell.split(", ")) <= set(wanted.split(", ")))
            for i, (wanted, cell) in enumerate(zip(row, cells, strict=True))
        )
        if not same:
            wrong.append("| " + " | ".join(row) + " |")
    assert not wrong, "rows that docs/routers.md lacks:\n" + "\n".join(wrong)


def test_commands_for_clusters_fit_the_devices_that_they_are_for(monkeypatch):
    """A CPU, one box, SLURM, a TPU slice, two slices, two machines of eight, and by Open MPI."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    commands = re.findall(r"(mpirun -n \d+)?.*python train\.py ([^\"\n]+)", text)
    for (launcher, command), devices in zip(commands, (8, 8, 32, 64, 128, 16, 16, 16), strict=True):
        told = {"SIZE": devices, "RANK": 0, "LOCAL_RANK": 0} if launcher else {}
        for name, number in told.items():
            monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(number))
        rank, rest = command_line.parse_rank(["train.py", *shlex.split(command)])
        cfg, workdir = command_line.parse(rest)
        sizes = mesh_shape(cfg.mesh, devices)
        check_divides(cfg.model, sizes)
        if rank.coordinator is None:  # the others train the quickstart, of whatever size
            assert cfg.train.batch_size // cfg.train.microbatches % batch_devices(sizes) == 0
        assert str(workdir) != "runs/quickstart"


def figures() -> list[str]:
    """The ids of the figures, each of which has its row, with its kind first in the last column."""
    lines = MEASUREMENTS.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| id |")]
    row = (
        r"\| `([a-z0-9]+(?:-[a-z0-9]+)+)` \| [^|]+ \| \*(?:measured|estimated|reported)\*,[^|]+ \|"
    )
    wrong = [line for line in rows if not re.fullmatch(row, line)]
    assert not wrong, f"not an id, a figure and a kind: {wrong}"
    return [re.fullmatch(row, line)[1] for line in rows]


def cited_figures(path: Path) -> list[str]:
    """The ids that a file cites, as in `(docs/measurements.md: ID, ID)`, over lines of comments."""
    lists = re.findall(r"measurements\.md\)?:([^)]*)\)", path.read_text(encoding="utf-8"))
    return [re.sub(r"[\s#/]+", "", cited) for ids in lists for cited in ids.split(",")]


def test_figures_have_an_id_of_their_own_and_a_kind():
    ids = figures()
    assert sorted(set(ids)) == sorted(ids)


def test_figures_that_are_cited_are_those_that_are_written_down():
    cited = {
        path.relative_to(ROOT).as_posix(): cited_figures(path)
        for path in [*SOURCES, *PAGES]
        if path != MEASUREMENTS
    }
    ids = set(figures())
    unknown = {file: set(names) - ids for file, names in cited.items() if set(names) - ids}
    assert not unknown
    assert not ids.difference(*cited.values())


def test_sources_that_name_the_page_of_figures_say_which_figure():
    texts = {path.name: path.read_text(encoding="utf-8") for path in SOURCES}
    page, citation = "docs/measurements.md", r"docs/measurements\.md:\s[^)]+\)"
    assert not [
        name for name, text in texts.items() if text.count(page) != len(re.findall(citation, text))
    ]
