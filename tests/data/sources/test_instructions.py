"""Instruction data in the forms that people have, and what is wrong with some of it."""

import json

import pytest

from dynmoe_jax import config
from dynmoe_jax.data.chat.conversation import read_spans
from dynmoe_jax.data.sources.document import Broken
from dynmoe_jax.data.sources.registry import read_documents

ONE_TURN = "<|user|>\nAdd 2 and 3.\n<|assistant|>\n5"


def read(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(read_documents(config.Data(sources=f"instructions:{path}")))


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"prompt": "Add 2 and 3.", "response": "5"}, ONE_TURN),
        ({"prompt": "Add 2 and 3.", "completion": " 5\n"}, ONE_TURN),
        ({"instruction": "Add 2 and 3.", "input": "", "output": "5"}, ONE_TURN),
        ({"messages": None, "prompt": None, "question": "Add 2 and 3.", "answer": "5"}, ONE_TURN),
        (
            {"instruction": "Add.", "input": "2, 3", "output": "5"},
            "<|user|>\nAdd.\n\n2, 3\n<|assistant|>\n5",
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello"},
                    {"role": "user", "content": "Bye"},
                    {"role": "assistant", "content": "Goodbye"},
                ]
            },
            "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello\n<|user|>\nBye\n"
            "<|assistant|>\nGoodbye",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Add 2 and 3."},
                    {"from": "gpt", "value": "5"},
                ]
            },
            ONE_TURN,
        ),
    ],
)
def test_every_form_becomes_turns_behind_marks(tmp_path, record, text):
    (document,) = read(tmp_path / "sums.jsonl", record)
    assert (document.text, document.domain) == (text, "sums")


@pytest.mark.parametrize("form", ["prompt", "messages", "system_message"])
def test_the_field_system_is_said_first(tmp_path, form):
    said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    record = {
        "prompt": {"prompt": "Hi", "response": "Hello"},
        "messages": {"messages": said},
        "system_message": {"messages": [{"role": "system", "content": "Be brief."}, *said]},
    }[form]
    (document,) = read(tmp_path / "x.jsonl", {"system": "Be brief.", **record})
    assert document.text == "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello"


def test_an_empty_response_is_not_learned(tmp_path):
    turns = ("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c"), ("assistant", " ")
    messages = [{"role": who, "content": said} for who, said in turns]
    (document,) = read(tmp_path / "x.jsonl", {"messages": messages})
    ((begin, end),) = read_spans(document.responses)
    assert document.text[begin:end] == "c"


def test_the_domain_of_a_record_is_its_own(tmp_path):
    name = config.Data().domain_field
    (document,) = read(tmp_path / "x.jsonl", {"prompt": "a", "response": "b", name: "sums"})
    assert document.domain == "sums"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1], "a JSON list, not an object"),
        ({"text": "a"}, "has no prompt and response"),
        ({"prompt": "a"}, "has no prompt and response"),
        ({"prompt": "a", "response": 5}, "is no string"),
        ({"prompt": "a", "response": "  "}, "the response is empty"),
        ({"prompt": "a", "response": "b", "input": ["c"]}, "the input is no string"),
        ({"prompt": "a", "response": "b", "system": 5}, "the system is no string"),
        ({"messages": []}, "no list of messages"),
        ({"messages": [{"role": "user"}]}, "no 'content' that is a string"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "by 'tool'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "has no response"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "by ['user']"),
    ],
)
def test_what_cannot_be_read_is_named_by_its_line(tmp_path, record, reason):
    found = read(tmp_path / "x.jsonl", {"prompt": "a", "response": "b"}, record)
    assert len(found) == 2
    assert isinstance(found[1], Broken)
    assert found[1].origin == f"{tmp_path / 'x.jsonl'}:2"
    assert reason in found[1].reason
