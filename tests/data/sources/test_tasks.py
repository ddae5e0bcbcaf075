"""Instruction tasks that are made on the spot."""

import collections

import pytest

from dynmoe_jax import config
from dynmoe_jax.data import DataError
from dynmoe_jax.data.chat.template import ChatTemplate
from dynmoe_jax.data.sources.registry import read_documents
from dynmoe_jax.data.sources.task_world import sentences
from dynmoe_jax.data.sources.tasks import PARTS, TASKS, conversations
from tests.data.test_chat_templates import TEMPLATES


def read(part, template=None):
    return list(read_documents(config.Data(sources=f"tasks:{part}"), template))


@pytest.mark.parametrize("part", PARTS)
def test_the_same_name_gives_the_same_documents(part):
    found = read(part)
    assert found == read(part)
    assert len({document.origin for document in found}) == len(found)


@pytest.mark.parametrize("part", ["mixture", "target"])
def test_templates_and_drawn_examples_of_evaluation_are_in_no_training(part):
    trained, held_out = (
        {turns[0][1] for _, turns in conversations(name)} for name in (part, f"{part}_unseen")
    )
    assert not trained & held_out
    for task in TASKS:
        if task.target == (part == "target"):
            begins = {template.partition("{")[0] for template in task.templates[-2:]}
            # What it begins with too: no trained template is a held-out one with another word.
            asked = [t.partition("{")[0] for t in task.templates[:-2]]
            assert not begins & set(asked), task.name


def test_tasks_left_out_are_no_part_of_the_mixture():
    parts = {name: {d.domain for d in read(name)} for name in PARTS if name != "facts"}
    assert parts["mixture"] == parts["mixture_unseen"]
    assert parts["target"] == parts["target_unseen"] == {"sound", "last"}
    assert not parts["mixture"] & parts["target"]


def test_answers_are_what_the_words_say():
    for name, turns in conversations("mixture_unseen"):
        asked, answer = turns[0][1], turns[1][1]
        if name == "first":
            assert asked.partition(answer)[1]
            words = asked.rpartition(" of ")[2].rstrip("?.").split(", ")
            assert words[0] == answer
    text = " ".join(document.text for document in read("facts"))
    counts = collections.Counter(sentence in text for sentence in sentences())
    assert counts[True] > 0.99 * counts.total()


def test_a_template_gives_them_its_form():
    template = ChatTemplate(TEMPLATES["chatml"], {})
    document = read("target", template)[0]
    begin, end = map(int, document.responses.split(":"))
    assert document.text[begin:end] == "moos<|im_end|>"


def test_a_part_that_is_not_there_is_refused():
    with pytest.raises(DataError, match=r"'tasks:other'; the parts of tasks are facts, mixture"):
        read("other")
