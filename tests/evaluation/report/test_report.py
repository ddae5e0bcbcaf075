"""The report page, over runs of every shape that a user can start."""

import dataclasses
import html.parser
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.evaluation.report.page import write_report
from dynmoe_jax.runs import summary as summaries


def fake_metrics(logged=120, layers=4, every=10, seed=0):
    """Lines of metrics.jsonl that look like those of a healthy run."""
    rng = np.random.default_rng(seed)
    lines = []
    for index in range(logged):
        step, share = every * (index + 1), (index + 1) / logged
        lm_loss = 3.1 + 5.2 * math.exp(-7 * share) + 0.08 * rng.standard_normal()
        depth = np.linspace(0, 1, max(layers, 1))
        experts = 1.6 + 1.2 * np.sin(2.2 * depth) + 3.5 * math.exp(-5 * share) * (1.2 - depth)
        experts = (experts + 0.05 * rng.standard_normal(max(layers, 1)))[:layers]
        line = {
            "step": step,
            "lm_loss": lm_loss,
            "loss": lm_loss + 0.03,
            "grad_norm": 0.4 + 2 * math.exp(-6 * share) + 0.3 * rng.random() ** 4,
            "learning_rate": 1e-3 * min(1, share / 0.1) * (0.55 + 0.45 * math.cos(math.pi * share)),
            "tokens_per_second": 11_500 + 2_500 * share - (4_000 if rng.random() < 0.04 else 0),
            "model_flops_per_second": 4.1e10,
            "mfu": math.nan,
            "seconds_data": 0.01,
            "seconds_step": 0.9,
        }
        if layers:
            line |= {
                "balance_loss": float(experts.mean() * (1 + 0.4 * math.exp(-5 * share))),
                "entropy_loss": 2.7 * math.exp(-0.7 * share) + 0.02 * rng.standard_normal(),
                "router_z_loss": 0.0,
                "experts_per_token": float(experts.mean()),
                "experts_per_token_by_layer": experts.tolist(),
                "load_imbalance_by_layer": (
                    1.2 + 2 * math.exp(-4 * share) + 0.2 * rng.random(layers)
                ).tolist(),
                "unused_experts": 0,
                "rows_dropped": 0,
            }
        lines.append(line)
    return lines


def fake_summary(layers=4, experts=16, bound=7, domains=("code", "prose", "docs"), seed=0, text=""):
    """Results that go with :func:`fake_metrics`."""
    rng = np.random.default_rng(seed)
    depth = np.linspace(0, 1, layers)
    usual = 1.6 + 1.2 * np.sin(2.2 * depth)  # where fake_metrics ends
    counts = [
        rng.multinomial(200_000, weights / weights.sum())
        for weights in np.exp(-((np.arange(bound) + 1 - usual[:, None]) ** 2) / usual[:, None])
    ]
    histogram = np.zeros((layers, bound + 1), int)
    histogram[:, 1:] = np.reshape(counts, (layers, bound))
    means = (histogram * np.arange(bound + 1)).sum(1) / 200_000
    load = rng.dirichlet(np.full(experts, 12.0), size=layers) * means[:, None]
    if layers > 2:
        load[1, 3 % experts] = 0.0

    def domain(index):
        by_layer = (means * (0.9 + 0.1 * index) + 0.05 * rng.standard_normal(layers)).tolist()
        return summaries.DomainResult(
            loss=3.0 + 0.2 * index,
            bits_per_byte=1.3 + 0.1 * index,
            tokens=120_000 - 9_000 * index,
            experts_per_token=float(np.mean(by_layer)) if layers else math.nan,
            experts_per_token_by_layer=by_layer,
        )

    words = (text or "first thing to know about a list is that it holds what you put there").split()
    pieces = [(" " + word, 1.2 + 3 * rng.random()) for word in words] if layers else []
    return summaries.Summary(
        complete=True,
        step=1200,
        steps=1200,
        parameters=11_800_000,
        active_parameters=4_300_000.0,
        heldout=summaries.HeldOut(
            loss=3.21,
            bits_per_byte=1.44,
            unigram_entropy=6.02,
            domains={name: domain(index) for index, name in enumerate(domains)},
            experts_per_token_by_layer=means.tolist(),
            load_by_layer=load.tolist(),
            histogram_by_layer=histogram.tolist(),
        ),
        tokens_per_second=13_412.0,
        mfu=math.nan,
        seconds={
            "data preparation": 31.2,
            "compile": 14.8,
            "data waiting": 1.9,
            "step": 231.0,
            "evaluation": 9.7,
            "total": 293.4,
        },
        sample=summaries.Sample("The ", "".join(" " + word for word in words), pieces),
        paths={"report": "report.html", "metrics": "metrics.jsonl", "checkpoints": "checkpoints"},
    )


def run_config(**moe):
    base = config.Config()
    model = dataclasses.replace(base.model, num_layers=4, moe=config.MoE(**moe))
    return dataclasses.replace(base, model=model, seed=7)


class Page(html.parser.HTMLParser):
    """Tags and attributes of a page, with a check that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def render(tmp_path, metrics, summary, settings=None):
    path = write_report(tmp_path / "run", settings or run_config(), metrics, summary)
    return path.read_text(encoding="utf-8")


def test_page_needs_nothing_from_outside(tmp_path):
    text = render(tmp_path, fake_metrics(), fake_summary())
    page = Page(text)
    links = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "data", "srcset")]
    assert links  # the heat map is an image, so there is something to check
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", text)


def test_every_picture_of_a_full_run_is_there(tmp_path):
    page = Page(render(tmp_path, fake_metrics(), fake_summary()))
    assert page.tags.count("svg") == page.tags.count("figure") == 10


def test_ids_are_unique_so_that_figures_do_not_borrow_each_others_clips(tmp_path):
    page = Page(render(tmp_path, fake_metrics(), fake_summary()))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {v[1:] for k, v in page.attributes if k == "xlink:href" and v.startswith("#")}
    assert used <= set(ids)


def test_figures_follow_dark_mode_in_every_colour_of_the_theme(tmp_path):
    text = render(tmp_path, fake_metrics(), fake_summary())
    figures = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert "var(--ink)" in figures
    assert "#1f2328" not in figures
    # matplotlib's default text colour would vanish on a dark page
    assert not re.search(r"fill: ?#000000|stroke: ?#000000", figures)


def test_hostile_text_is_shown_and_never_run(tmp_path):
    attack = "<script>alert(1)</script> \"' onload=x <img/src=y> \x1b[31m \ud800"
    summary = fake_summary(domains=(attack, "__hidden", "$x_{"), text=attack)
    sample = dataclasses.replace(summary.sample, prompt=attack)
    base = run_config()
    sources = attack.removesuffix("\ud800")  # which settings refuse
    settings = dataclasses.replace(base, data=dataclasses.replace(base.data, sources=sources))
    page = Page(
        render(tmp_path, fake_metrics(), dataclasses.replace(summary, sample=sample), settings)
    )
    assert not {"script", "img"} & set(page.tags)
    assert not any(name == "onload" for name, _ in page.attributes)
    text = "".join(page.text)
    assert "<script>alert(1)</script>" in text
    assert "\x1b" not in text


def test_the_same_run_gives_the_same_page(tmp_path):
    pages = [render(tmp_path, fake_metrics(), fake_summary()) for _ in range(2)]
    assert pages[0] == pages[1]


def test_weights_of_domains_that_moved_have_a_picture_with_their_names(tmp_path):
    metrics = fake_metrics(logged=4)
    assert "Weights of the domains" not in render(tmp_path, metrics, fake_summary())
    moved = [
        line | {"domain_weight_code": 0.5 + 0.1 * i, "domain_weight_prose": 0.5 - 0.1 * i}
        for i, line in enumerate(metrics)
    ]
    page = render(tmp_path, moved, fake_summary())
    assert "Weights of the domains" in page
    assert "toward domains whose held-out loss exceeds" in page


def test_dense_model_has_losses_but_no_word_of_experts(tmp_path):
    summary = fake_summary(layers=0)
    text = render(tmp_path, fake_metrics(layers=0), summary, run_config(every_n_layers=0))
    results = text[: text.index("<h2>Settings")]
    assert Page(text).tags.count("svg") == 3
    assert "expert" not in results[results.index("<body>") :].lower()


def test_fixed_number_of_experts_is_one_sentence_not_four_flat_pictures(tmp_path):
    metrics, summary = fake_metrics(), fake_summary()
    for line in metrics:
        line |= {"experts_per_token": 2.0, "experts_per_token_by_layer": [2.0] * 4}
    heldout = dataclasses.replace(summary.heldout, histogram_by_layer=[[0, 0, 500]] * 4)
    summary = dataclasses.replace(summary, heldout=heldout)
    text = render(tmp_path, metrics, summary, run_config(router="top_k"))
    assert "Every token used exactly 2 experts" in text
    assert text.count("<svg") == 6
    metrics[0]["experts_per_token"] = 5.0  # a router that ended there still has a story to tell
    assert render(tmp_path, metrics, summary).count("<svg") == 10


@pytest.mark.parametrize("layers", [0, 1, 4])
def test_single_logged_step(tmp_path, layers):
    text = render(tmp_path, fake_metrics(logged=1, layers=layers), fake_summary(layers=layers))
    assert Page(text).tags.count("svg") >= 3


def test_no_logged_step_still_shows_the_results(tmp_path):
    assert "3.210" in render(tmp_path, [], fake_summary())


def test_nan_and_infinity_are_told_and_do_not_stop_the_page(tmp_path):
    metrics = fake_metrics(logged=30)
    metrics[3] |= {"loss": math.nan, "lm_loss": math.inf, "grad_norm": math.nan}
    metrics[4]["experts_per_token_by_layer"] = [math.nan] * 4
    metrics[5]["load_imbalance_by_layer"] = [math.nan] * 4
    for line in metrics:
        line["entropy_loss"] = math.nan
    text = render(tmp_path, metrics, fake_summary())
    assert "not finite at 1 of 30" in text
    broken = fake_summary()
    heldout = dataclasses.replace(
        broken.heldout,
        loss=math.nan,
        experts_per_token_by_layer=[math.nan] * 4,
        load_by_layer=[[math.nan] * 16] * 4,
        histogram_by_layer=[[0] * 8] * 4,
    )
    render(tmp_path, metrics, dataclasses.replace(broken, heldout=heldout))


def test_everything_nan_from_the_first_step(tmp_path):
    metrics = [
        {
            name: value
            if name == "step"
            else [math.nan] * len(value)
            if isinstance(value, list)
            else math.nan
            for name, value in line.items()
        }
        for line in fake_metrics(logged=5)
    ]
    assert "not finite at 5 of 5" in render(tmp_path, metrics, fake_summary())


@pytest.mark.parametrize(("layers", "experts", "bound"), [(1, 2, 2), (48, 128, 52)])
def test_extreme_shapes_stay_small(tmp_path, layers, experts, bound):
    domains = tuple(f"a domain with a really long name, number {i}" * 3 for i in range(9))
    summary = fake_summary(layers=layers, experts=experts, bound=bound, domains=domains)
    text = render(tmp_path, fake_metrics(logged=3000, layers=layers), summary)
    assert len(text) < 1_000_000


def test_importing_the_report_does_not_load_matplotlib():
    code = (
        "import sys, dynmoe_jax.evaluation.report.page, dynmoe_jax.runs.metrics_file\n"
        "slow = {'matplotlib', 'tensorboardX', 'wandb'} & set(sys.modules)\n"
        "sys.exit(f'loaded {slow}' if slow else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
