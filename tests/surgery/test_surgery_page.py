"""The page of a result, over records of every shape."""

import itertools
import re
import shlex

import numpy as np
import pytest

from dynmoe_jax.runs.records import from_json, to_json
from dynmoe_jax.surgery import operations
from dynmoe_jax.surgery.arguments import parse
from dynmoe_jax.surgery.operation import OPERATIONS, settings_of
from dynmoe_jax.surgery.report.command import command_of
from dynmoe_jax.surgery.report.page import write_page
from dynmoe_jax.surgery.request import Options
from tests.evaluation.report.test_report import Page

assert operations  # importing them registers them


def side(layers, width, experts, kept=1.0):
    """One side of a record: so many layers, with experts in every second one."""
    random = np.random.default_rng(layers)
    routed = [n for n in range(layers) if experts and n % 2]
    load = {str(n): (2 * random.dirichlet(np.full(experts, 9.0))).tolist() for n in routed}
    return {
        "parameters": 7_000_000 * layers,
        "active_parameters": 5_000_000.0 * layers,
        "stored_bytes": 28_000_000 * layers,
        "file_bytes": 29_000_000 * layers,
        "layers": [
            {"experts": experts if n in routed else 0, "width": width} for n in range(layers)
        ],
        "routers": ["top-2"] if experts else [],
        "flops_per_token": 3e9,
        "kv_bytes_per_token": 4096,
        "heldout_loss": 3.0 * kept,
        "heldout_bits_per_byte": 1.3 * kept,
        "experts_per_token": 2.0 if experts else float("nan"),
        "load": load,
        "router_entropy": {n: 1.9 + 0.1 * random.random() for n in load},
    }


def record(operation="upcycle", parents=("runs/dense",), layers=6, experts=8, **changes):
    """A record as surgery.json holds it; texts that are written can be given."""
    domains = {
        name: {
            "tokens": 4000 - 100 * i,
            "loss_before": 3.0,
            "loss_after": 3.1 + 0.1 * i,
            "bits_before": 1.3 + 0.1 * i,
            "bits_after": 1.31 + 0.12 * i,
            "kl": 0.02 * (i + 1),
            "agreement": 0.97,
            "difference": 0.4,
        }
        for i, name in enumerate(changes.pop("domains", ("code", "docs", "prose")))
    }
    text = changes.pop("text", "def main(argv):\n    return 0")
    pieces = [["def", 1.5], [" main", 2.5], ["(argv):\n    return 0", 2.0]]
    sample = {
        "prompt": text[:9],
        "before": {"text": text[9:], "pieces": []},
        "after": {"text": text[9:] + "!", "pieces": pieces if experts else []},
    }
    kind = OPERATIONS.get(operation)
    told = {
        "operation": operation,
        "settings": dict(settings_of(kind())) if kind else {"ratio": 0.5},
        "options": dict(vars(Options())),
        "parents": [
            {"folder": folder, "digest": f"{i}" * 64, "file_bytes": 10**8, "moments": True}
            for i, folder in enumerate(parents)
        ],
        "digest": "f" * 64,
        "moments_digest": "e" * 64,
        "exact": {"promised": None, "measured": 0.031},
        "before": side(layers, 1536, 0),
        "after": side(layers, 1536, experts, 1.05),
        "compared": {
            "all": next(iter(domains.values())),
            "domains": domains,
            "largest_logit": 13.0,
        },
        "data": {"sources": "python", "content": "c" * 64},
        "moments": "carried",
        "remarks": ["All experts of a layer are equal: until training tells them apart, …"],
        "history": [],
        "calibration": {
            "statistics": ["ffn_input_samples", "router_input"],
            "files": ["calibration/0123-4567.safetensors"],
            "data": ["d" * 64],
            "tokens": [4096],
            "by_expert": {"1": [0, 2000, 1024, 1072]},
        },
        "found": {"0": {"oracle": 0.1234567, "chance": 0.5}, "3": {"oracle": 0.25}},
        "versions": {"dynmoe_jax": "0.1.0", "jax": "0.10.2"},
        "samples": {"texts": [sample, sample], "left_out": ""},
        "seconds": 93.0,
    }
    return from_json(to_json(told | changes))


def rendered(folder, given):
    return write_page(folder, given).read_text(encoding="utf-8")


def headings(text):
    return re.findall(r"<h2>(.*?)</h2>", text)


SECTIONS = ["Before and after", "Held-out text by domain", "Layers", "Tokens by expert",
            "Calibration", "Found in layers", "Samples", "What was done", "History",
            "Versions"]  # fmt: skip


def test_page_has_all_sections_and_needs_nothing_from_outside(tmp_path):
    text = rendered(tmp_path, record())
    page = Page(text)
    assert headings(text) == SECTIONS
    links = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "data", "srcset")]
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org)", text)


def test_every_picture_has_a_caption_and_an_alternative_text(tmp_path):
    text = rendered(tmp_path, record())
    figures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    assert len(figures) == 6  # bits, KL, experts, load, experts per token, entropy
    for figure in figures:
        title, caption = re.findall(r"<figcaption><(?:b|span)>(.*?)</(?:b|span)>", figure)
        assert re.search(r'role="img" aria-label="(.*?)"', figure)[1] == title
        assert len(caption) > 30


def test_experts_that_starve_are_named(tmp_path):
    given = record(layers=4, experts=4)
    given["after"]["load"] = {"1": [0.0, 1.0, 0.96, 0.04], "3": [0.5, 0.5, 0.5, 0.5]}
    text = rendered(tmp_path, given).split("<h2>Tokens by expert</h2>")[1]
    rows = [re.findall(r"<td.*?>(.*?)</td>", row) for row in text.split("<tr>")[2:4]]
    assert rows[0] == ["1", "2,000", "0 (expert 0)", "4,000 (expert 1)", "0, 3"]
    assert rows[1][:2] == ["3", "2,000"]
    assert rows[1][-1] == "–"
    assert "Of 4,000 held-out tokens. 2 of 8 experts got less than 10 %" in text


def test_choices_are_drawn_beside_their_controls(tmp_path):
    found = {
        str(layer): {"these experts": 0.1, "random units": 0.3, "different units": 20}
        for layer in range(3)
    }
    text = rendered(tmp_path, record("split", found=found))
    section = text.split("<h2>Choices beside controls</h2>")[1].split("<h2>")[0]
    assert "How good is the choice?" in section
    # What is not there of them, and what is no choice, is not drawn.
    legend = re.findall(r"<text[^>]*>([a-z ]+)</text>", section)
    assert {"these experts", "random units"} <= set(legend)
    assert not {"units by size", "different units"} & set(legend)
    rows = re.findall(r"<tr>(.*?)</tr>", section)
    assert re.findall(r"<td.*?>(.*?)</td>", rows[-1]) == ["2", "0.1", "0.3", "20"]
    assert OPERATIONS["split"].found in text.replace("&#x27;", "'")


def test_routers_of_both_sides_are_named(tmp_path):
    assert "Routers: before none, after top-2." in rendered(tmp_path, record())
    assert "Routers:" not in rendered(tmp_path, record("stack", experts=0))


def test_experts_with_statistics_of_few_tokens_are_named(tmp_path):
    text = rendered(tmp_path, record()).split("<h2>Calibration</h2>")[1]
    row = re.findall(r"<td.*?>(.*?)</td>", text.split("<tr>")[2])
    assert row == ["1", "1,024", "0 (expert 0)", "2,000 (expert 1)", "0"]
    assert "Gathered of 4,096 tokens of training text: ffn_input_samples, router_input." in text
    assert "1 of 4 experts got less than 10 %" in text
    without = rendered(tmp_path, record(calibration={}))
    assert "<h2>Calibration</h2>" not in without


def test_what_is_the_same_before_and_after_is_said_and_not_drawn(tmp_path):
    given = record("stack", layers=2, experts=0)
    for part in given["compared"]["domains"].values():
        part["kl"] = 1e-9
    given["exact"] = {"promised": 1e-5, "measured": 2e-7}
    text = rendered(tmp_path, given)
    assert text.count("<figure>") == 2  # bits, and the layers; nobody has a router
    assert "promises to keep the function" in text
    assert "2e-07 of the largest, and 1e-05 is allowed" in text


def test_the_chain_of_operations_ends_with_this_one(tmp_path):
    first = {"operation": "upcycle", "settings": {"noise": 0.01, "layers": ""}, "digest": "a" * 64}
    table = rendered(tmp_path, record("stack", history=[first])).split("<h2>History</h2>")[1]
    rows = [re.findall(r"<td.*?>(.*?)</td>", row) for row in table.split("<tr>")[2:4]]
    assert rows[0] == ["1", "upcycle", "noise = 0.01", f"{'a' * 16}…"]
    assert rows[1][:2] == ["2", "stack"]


def test_several_parents_are_all_named(tmp_path):
    text = rendered(tmp_path, record("mix", parents=("runs/code", "runs/prose")))
    assert "mix of code, prose" in text
    assert "--from=runs/code \\\n    --from=runs/prose" in text
    assert "0" * 64 in text
    assert "1" * 64 in text
    assert "Before is the first parent" in text


def test_samples_that_were_left_out_say_why(tmp_path):
    given = record(samples={"texts": [], "left_out": "A model has 700M parameters."})
    assert '<h2>Samples</h2><p class="soft">A model has 700M parameters.' in rendered(
        tmp_path, given
    )


def test_settings_are_told_with_the_defaults_that_they_differ_from(tmp_path):
    given = record()
    given["settings"] |= {"noise": 0.01, "shuffle": True, "layers": "0-3"}
    cells = re.findall(r"<td>(.*?)</td>", rendered(tmp_path, given))
    told = dict(itertools.pairwise(cells))
    assert told["noise = 0.01"].endswith("(default: 0.0)")
    assert told["shuffle = true"].endswith("(default: false)")
    assert told["layers = 0-3"].endswith("(default: empty)")
    assert "default" not in told["num_experts = 8"]


def test_an_operation_that_is_not_known_here_is_shown_all_the_same(tmp_path):
    text = rendered(tmp_path, record("prune_somehow"))
    assert headings(text) == SECTIONS
    assert "--ratio=0.5" in text


def test_hostile_text_is_shown_and_never_run(tmp_path):
    attack = "<script>alert(1)</script> \"' onload=x <img/src=y> \x1b[31m"
    given = record(parents=(attack,), domains=(attack, "__hidden", "$x_{"), text=attack,
                   remarks=[attack], data={"sources": attack, "content": ""})  # fmt: skip
    page = Page(rendered(tmp_path, given))
    assert not {"script", "img"} & set(page.tags)
    assert not any(name == "onload" for name, _ in page.attributes)
    assert "\x1b" not in "".join(page.text)


@pytest.mark.parametrize("moments", ["carry", "reset"])
def test_the_command_has_every_setting_that_is_not_a_default_and_reads_back(moments):
    given = record(parents=("runs/my model",))
    given["settings"] |= {"num_experts": 16, "shuffle": True, "layers": "2,5-7"}
    given["options"] |= {"moments": moments, "tokens": 99}
    line = command_of(given, "runs/again").replace("\\\n", " ")
    assert ("--moments" in line) == (moments == "reset")
    program, *argv = shlex.split(line.removeprefix("python -m "))
    assert program == "dynmoe_jax.surgery"
    asked = parse(argv).asked
    assert dict(settings_of(asked.operation)) == given["settings"]
    assert vars(asked.options) == given["options"]
    assert [str(parent) for parent in asked.parents] == ["runs/my model"]
