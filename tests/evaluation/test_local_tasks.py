"""The harness's own task definitions on local files."""

import gzip
import json

import pytest

pytest.importorskip("lm_eval", reason="needs the extra eval: pip install -e '.[eval]'")

from dynmoe_jax import config
from dynmoe_jax.evaluation.local_tasks import find_items, load_tasks, read_items

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
    write = lambda name, items: (tmp_path / name).write_text(  # noqa: E731
        "".join(json.dumps(item) + "\n" for item in items), encoding="utf-8"
    )
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
    with pytest.raises(config.ConfigError, match=r"piqa\.jsonl cannot be read as JSON"):
        load_tasks(["piqa"], tmp_path)
    (tmp_path / "piqa.json").write_text("[]")
    with pytest.raises(config.ConfigError, match="twice"):
        load_tasks(["piqa"], tmp_path)


def test_forms_of_files(tmp_path):
    lines = json.dumps(PIQA, ensure_ascii=False) + "\n\n" + json.dumps({"goal": "a\u2028b"}) + "\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert read_items(tmp_path / "a.jsonl.gz") == [PIQA, {"goal": "a\u2028b"}]
    (tmp_path / "b.json").write_text(json.dumps({"canary": "x", "examples": [PIQA]}))
    assert read_items(tmp_path / "b.json") == [PIQA]
    (tmp_path / "c.json").write_text(json.dumps([PIQA]))
    assert read_items(tmp_path / "c.json") == [PIQA]
    for text in ("[]", "[1]", '{"examples": 3}', "3"):
        (tmp_path / "d.json").write_text(text)
        with pytest.raises(config.ConfigError, match="must hold records"):
            read_items(tmp_path / "d.json")
