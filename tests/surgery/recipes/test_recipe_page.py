"""Pictures of a recipe's page."""

import pytest
from matplotlib.colors import to_rgba

from dynmoe_jax.surgery.recipes import page


class Kept(page.Canvas):
    """Gives figures themselves, not their pictures."""

    def picture(self, figure, title, caption):
        return figure, caption


def step_of(name, curve=(), by_domain=None):
    return {"name": name, "seed": "", "curve": list(curve), "by_domain": by_domain or {}}


def test_lines_of_many_steps_can_be_told_apart():
    steps = [step_of(f"line_{i}", [(i, 2.0), (i + 1, 1.0)]) for i in range(10)]
    steps += [step_of(f"point_{i}", [(i, 2.0)]) for i in range(10)]
    figure, _ = page._against_flops({"steps": steps}, Kept())
    looks = {
        (line.get_color(), line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines
    }
    assert len(looks) == len(steps)


@pytest.mark.parametrize(("domains", "shown", "said"), [(3, 3, False), (100, 30, True)])
def test_bars_of_many_domains_are_as_many_as_can_be_read(domains, shown, said):
    bits = {f"domain_{i:03d}": 2.0 for i in range(domains)}
    steps = [step_of("one", by_domain=bits), step_of("other", by_domain=bits)]
    record = {"steps": steps, "comparisons": [{"model": "one", "than": "other"}]}
    figure, caption = page._by_domain(record, Kept())
    assert len(figure.axes[0].get_yticklabels()) == shown
    assert ("70 more domains" in caption) == said


def test_what_a_sweep_found_stands_beside_what_was_compared():
    sweep = {"name": "model_swept", "seed": "1", "efforts": {"share": []}, "note": "share: less"}
    record = {"steps": [sweep], "comparisons": [{"sentence": "one has more than other."}]}
    shown = page._comparisons(record)
    assert "<p>one has more than other.</p><p>model swept, seed 1: share: less.</p>" in shown


def test_responses_are_shown_by_task_over_seeds():
    steps = [
        {"name": "one", "seed": "0", "exact": {"all": 0.5, "sums": 1.0}},
        {"name": "one", "seed": "1", "exact": {"all": 0.25, "sums": 0.5}},
        {"name": "other", "seed": "", "exact": {}},
    ]
    shown = page._responses({"steps": steps})
    assert "37.5" in shown
    assert "75.0" in shown
    assert "other" not in shown
    assert page._responses({"steps": steps[2:]}) == ""


def test_a_step_looks_alike_in_every_picture():
    bits = {"code": 2.0, "docs": 3.0}
    steps = [step_of("before", [(0, 3.0), (1, 2.0)])]
    steps += [step_of(name, [(1, 2.0)], bits) for name in ("one", "other")]
    record = {"steps": steps, "comparisons": [{"model": "one", "than": "other"}]}
    (lines,), (bars,) = (
        draw(record, Kept())[0].axes for draw in (page._against_flops, page._by_domain)
    )
    of_bars = {bar.get_label(): bar.patches[0].get_facecolor() for bar in bars.containers}
    for line in lines.lines:
        if line.get_label() != "before":
            assert of_bars[line.get_label()] == to_rgba(line.get_color())
    assert len(set(of_bars.values())) == 2


def test_the_table_of_steps_has_means_over_seeds():
    whole = dict.fromkeys(("experts_per_token", "parameters", "active_parameters", "seconds"))
    whole |= {
        "kind": "train",
        "needs": [],
        "flops": 2e9,
        "all_flops": 4e9,
        "bytes": 3e6,
        "page": "",
    }
    steps = [
        whole | {"name": "one", "key": key, "seed": seed, "bits_per_byte": bits}
        for key, seed, bits in (("a", "0", 2.0), ("b", "1", 3.0))
    ]
    shown = page._steps({"steps": steps, "seeds": 2})
    assert shown.count("<td") == 11
    assert "2.5000" in shown
    assert "Means over 2 seeds." in shown
    assert "Means" not in page._steps({"steps": steps[:1], "seeds": 2})
