"""The harness's own task definitions on local files."""

import gzip
import json
import random

import pytest

pytest.importorskip("lm_eval", reason="needs the extra eval: pip install -e '.[eval]'")

from lm_eval.evaluator import evaluate
from lm_eval.models.dummy import DummyLM

from dynmoe_jax import config
from dynmoe_jax.evaluation.harness.item_files import find_items, read_items
from dynmoe_jax.evaluation.harness.local_items import Items, as_data_set
from dynmoe_jax.evaluation.harness.local_tasks import load_tasks
from dynmoe_jax.evaluation.harness.quiet import quiet_harness
from tests.odd_items import odd_items

PIQA = {"goal": "To boil water", "sol1": "heat it.", "sol2": "cool it.", "label": 0}


@pytest.fixture(scope="module")
def loaded(items):
    names = ["piqa", "hellaswag", "arc_easy", "commonsense_qa", "bbh"]
    return load_tasks(names, items)


def docs(task):
    return list(task.eval_docs)


def test_each_task_has_the_items_of_its_file(loaded, items):
    for name in ("piqa", "hellaswag", "arc_easy", "commonsense_qa"):
        (task,) = loaded[name]
        assert len(docs(task)) == len(read_items(find_items(items, [name]))) == 8


def test_definitions_are_the_harness_own(loaded):
    (hellaswag,) = loaded["hellaswag"]
    doc = docs(hellaswag)[0]
    assert hellaswag.doc_to_text(doc).startswith(
        "Roof shingle removal: A man is sitting on a roof."
    )
    assert doc["gold"] == 3
    (piqa,) = loaded["piqa"]
    assert piqa.doc_to_text(docs(piqa)[0]).startswith("Question: How do I ready a guinea pig cage")
    (arc,) = loaded["arc_easy"]
    assert list(arc.aggregation()) == ["acc", "acc_norm"]


def test_bbh_is_the_group_of_27_with_direct_answers(loaded):
    (group,) = loaded["bbh"]
    tasks = list(group.get_all_tasks())
    assert group.name == "bbh_fewshot"
    assert len(tasks) == 27
    assert all(len(docs(task)) == 2 for task in tasks)
    task = next(t for t in tasks if t.task_name == "bbh_fewshot_boolean_expressions")
    assert task.doc_to_target(docs(task)[0]) in ("True", "False")


def test_spaces_around_an_answer_do_not_count_in_bbh(loaded, items):
    (group,) = loaded["bbh"]
    name = "bbh_fewshot_boolean_expressions"
    task = next(t for t in group.get_all_tasks() if t.task_name == name)
    (own,) = load_tasks([name], items)[name]
    for one, counted in ((task, 1.0), (own, 0.0)):
        one.build_all_requests()
        for instance in one.instances:
            instance.resps = [" " + one.doc_to_target(instance.doc)]
        one.apply_filters()
        answered = one.instances[0]
        result = one.process_results(answered.doc, [answered.filtered_resps["none"]])
        assert result["exact_match"] == counted


def test_unknown_task_is_refused_with_its_nearest_names(items):
    with pytest.raises(config.ConfigError, match=r"'hellaswaag'.*did you mean hellaswag"):
        load_tasks(["piqa", "hellaswaag"], items)


def test_examples_come_from_a_file_of_their_own_or_from_other_items(tmp_path):
    write = lambda name, items: write_lines(tmp_path / name, items)  # noqa: E731
    write("piqa.jsonl", [PIQA | {"goal": f"item {i}"} for i in range(3)])
    for expected in ("item", "example"):
        (task,) = load_tasks(["piqa"], tmp_path)["piqa"]
        task.set_config("num_fewshot", 2)
        task.set_fewshot_seed(0)
        for i, doc in enumerate(docs(task)):
            text = task.fewshot_context(doc, num_fewshot=2)
            assert text.count(expected) >= 2
            assert text.count(f"item {i}") == 1  # never its own example
        write("piqa.train.jsonl", [PIQA | {"goal": f"example {i}"} for i in range(4)])


def test_what_is_missing_or_broken_is_named(tmp_path):
    with pytest.raises(config.ConfigError, match="no items of the task piqa; put them there as"):
        load_tasks(["piqa"], tmp_path)
    with pytest.raises(config.ConfigError, match="is no folder"):
        load_tasks(["piqa"], tmp_path / "nowhere")
    (tmp_path / "piqa.jsonl").write_text("{broken")
    with pytest.raises(config.ConfigError, match=r"piqa\.jsonl, line 1, cannot be read as JSON"):
        load_tasks(["piqa"], tmp_path)
    (tmp_path / "piqa.json").write_text("[]")
    with pytest.raises(config.ConfigError, match="twice"):
        load_tasks(["piqa"], tmp_path)


def test_forms_of_files(tmp_path):
    other = PIQA | {"goal": "a\u2028b"}
    lines = json.dumps(PIQA, ensure_ascii=False) + "\n\n" + json.dumps(other) + "\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert read_items(tmp_path / "a.jsonl.gz") == [PIQA, other]
    (tmp_path / "b.json").write_text(json.dumps({"canary": "x", "examples": [PIQA]}))
    assert read_items(tmp_path / "b.json") == [PIQA]
    (tmp_path / "c.json").write_text(json.dumps([PIQA]))
    assert read_items(tmp_path / "c.json") == [PIQA]
    for text in ("[]", "[1]", '{"examples": 3}', "3"):
        (tmp_path / "d.json").write_text(text)
        with pytest.raises(config.ConfigError, match="must hold records"):
            read_items(tmp_path / "d.json")


def test_items_that_are_not_alike_are_all_asked(tmp_path, capsys):
    """A field that the first one lacks, a number among texts: requests say what items have."""
    lines = [
        PIQA,
        PIQA | {"goal": 7, "hint": "here", "label": 1},
        PIQA | {"goal": "7a", "sol1": 2.5, "meta": {"a": 1}},
        PIQA | {"goal": "hi \ud83d", "meta": {"b": [1, "x", 10**30]}},
    ]
    write_lines(tmp_path / "piqa.jsonl", lines)
    (task,) = load_tasks(["piqa"], tmp_path)["piqa"]
    assert [doc["goal"] for doc in docs(task)] == ["To boil water", "7", "7a", "hi \ufffd"]
    assert [doc["hint"] for doc in docs(task)] == [None, "here", None, None]
    assert [doc["label"] for doc in docs(task)] == [0, 1, 0, 0]
    assert docs(task)[2]["meta"] == {"a": 1}
    # The number 1 stands where a text does, and becomes one.
    assert docs(task)[3]["meta"] == {"b": ["1", "x", str(10**30)]}
    task.build_all_requests()
    asked = [instance.args for instance in task.instances]
    assert len(asked) == 8
    assert asked[2] == ("Question: 7\nAnswer:", " heat it.")
    assert asked[4] == ("Question: 7a\nAnswer:", " 2.5")
    printed = capsys.readouterr().out
    assert "'goal' (item 1, item 2)" in printed
    assert "lack 'hint' (3, the first is item 1)" in printed


def test_an_item_that_a_task_cannot_use_is_left_out_and_said(tmp_path, capsys):
    label = {"activity_label": "a", "ctx_a": "one", "ctx_b": "two", "endings": ["e", "f"]}
    hellaswag = label | {"label": "1"}
    lines = [label, hellaswag, hellaswag | {"endings": 3}, hellaswag | {"ctx_b": None}, hellaswag]
    write_lines(tmp_path / "hellaswag.jsonl", lines)
    (task,) = load_tasks(["hellaswag"], tmp_path)["hellaswag"]
    assert len(docs(task)) == 2
    task.build_all_requests()
    assert len(task.instances) == 4
    printed = capsys.readouterr().out
    for number, reason in ((1, "TypeError"), (3, "TypeError"), (4, "AttributeError")):
        assert f"item {number} is left out of hellaswag: {reason}" in printed
    lines = [PIQA | {"sol1": "", "label": 5}, PIQA | {"label": None}, PIQA | {"label": 2}, PIQA]
    write_lines(tmp_path / "piqa.jsonl", lines)
    (task,) = load_tasks(["piqa"], tmp_path)["piqa"]
    assert docs(task) == [PIQA]
    printed = capsys.readouterr().out
    for number, reason in ((1, "its choices"), (2, "it has no answer"), (3, "IndexError")):
        assert f"item {number} is left out of piqa: {reason}" in printed
    write_lines(tmp_path / "piqa.jsonl", lines[:3])
    with pytest.raises(config.ConfigError, match=r"no item of the task piqa \(item 1: its choices"):
        load_tasks(["piqa"], tmp_path)


def test_more_examples_than_there_are_is_one_sentence(tmp_path):
    lines = [PIQA | {"goal": goal} for goal in ("one", "two", "two")]
    write_lines(tmp_path / "piqa.jsonl", lines)
    (task,) = load_tasks(["piqa"], tmp_path)["piqa"]
    for wanted, allowed in ((1, True), (2, False), (9, False)):
        task.set_config("num_fewshot", wanted)
        task.set_fewshot_seed(0)
        if allowed:
            task.build_all_requests()
        else:
            with pytest.raises(config.ConfigError, match=rf"--num_fewshot={wanted} .* than the 1 "):
                task.build_all_requests()


def test_an_evaluation_of_odd_items_comes_to_its_end(tmp_path):
    lines = [
        PIQA,
        PIQA | {"goal": "hi \ud83d"},
        PIQA | {"sol1": ""},
        PIQA | {"goal": 7, "n": 2**70},
    ]
    write_lines(tmp_path / "piqa.jsonl", lines)
    with quiet_harness():
        tasks = load_tasks(["piqa"], tmp_path)["piqa"]
        found = evaluate(DummyLM(), {"piqa": tasks[0]}, bootstrap_iters=0)
    assert found["n-samples"]["piqa"] == {"original": 3, "effective": 3}
    assert [sample["doc"]["n"] for sample in found["samples"]["piqa"]] == [None, None, 2**70]
    json.dumps(found["samples"], ensure_ascii=False).encode()


def write_lines(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def test_data_sets_have_exactly_the_items_of_odd_files(tmp_path, fuzz_cases):
    exact = 0
    for case in range(fuzz_cases(60, 600)):
        path, items = odd_items(random.Random(case), tmp_path)
        if items is None:
            continue
        found = as_data_set(read_items(path))
        assert json.dumps(list(found)) == json.dumps(read_items(path)), f"case {case}"
        first = found.map(lambda item: {"new": sorted(item)}).filter(lambda item: item["new"])
        assert list(first.features) == ([*found.features, "new"] if len(first) else [])
        exact += isinstance(found, Items)
    assert exact > 5
