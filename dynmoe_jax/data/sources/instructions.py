"""Instruction data: JSON Lines of prompts and responses, or of messages, as documents with marks.

The forms that people have: ``prompt`` (or ``instruction``, with an optional ``input``, or
``question``) and ``response`` (or ``completion``, ``output``, ``answer``); ``messages`` of ``role``
and ``content``; ``conversations`` of ``from`` and ``value``.  A document is the conversation in
the tokenizer's chat template, or its turns, each behind the mark of who speaks; it knows where its
responses are, so that the objective ``response_only`` finds them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from dynmoe_jax.data.chat.conversation import ASSISTANT, MARKS, Turns, marked, write_spans
from dynmoe_jax.data.chat.template import ChatTemplate, TemplateFailure
from dynmoe_jax.data.sources import tasks
from dynmoe_jax.data.sources.document import Broken, Document, checked, field
from dynmoe_jax.data.sources.files import json_lines, shown, stem

_PROMPTS = ("prompt", "instruction", "question")
_RESPONSES = ("response", "completion", "output", "answer")
_TURNS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_SPEAKERS = {"human": "user", "gpt": ASSISTANT, "model": ASSISTANT}


def read_instructions(
    path: Path, domain_field: str, template: ChatTemplate | None = None
) -> Iterator[Document | Broken]:
    """One document a line; the file's name stands in for a missing domain.

    Args:
      path: of the file.
      domain_field: field with the domain.
      template: of the tokenizer; None for marks.
    """
    for number, value in json_lines(path):
        if isinstance(value, Broken):
            yield value
            continue
        origin = f"{shown(path)}:{number}"
        turns = turns_of(value)
        if isinstance(turns, str):
            yield Broken(origin, turns)
            continue
        try:
            domain = field(value, domain_field)
        except KeyError:
            domain = None
        item = _document(turns, template, domain, origin, stem(path))
        if item is not None:
            yield item


def read_tasks(part: str, template: ChatTemplate | None = None) -> Iterator[Document | Broken]:
    """Documents of tasks that are made on the spot, by domain of the task.

    Args:
      part: see :data:`.tasks.PARTS`.
      template: of the tokenizer; None for marks.
    """
    if part == tasks.FACTS:
        for number, text in enumerate(tasks.paragraphs()):
            yield Document(text, part, f"tasks:{part}:{number}")
        return
    for number, (name, turns) in enumerate(tasks.conversations(part)):
        item = _document(turns, template, name, f"tasks:{part}:{number}", name)
        if item is not None:
            yield item


def _document(
    turns: Turns, template: ChatTemplate | None, domain: object, origin: str, stand_in: str
) -> Document | Broken | None:
    """A conversation as a document; Broken where the template does not take it."""
    try:
        said = marked(turns) if template is None else template.conversation(turns)
    except TemplateFailure as error:
        return Broken(origin, str(error))
    item = checked(said.text, domain, origin, stand_in)
    if isinstance(item, Document):
        return item._replace(responses=write_spans(said.responses))
    return item


def turns_of(record: object) -> list[tuple[str, str]] | str:
    """The turns of a record, or what is wrong with it."""
    if not isinstance(record, Mapping):
        return f"a JSON {type(record).__name__}, not an object"
    # Tables that became JSON have a null for every column that a record does not fill.
    record = {name: value for name, value in record.items() if value is not None}
    system, turns = record.get("system", ""), _said(record)
    if isinstance(turns, str):
        return turns
    if not isinstance(system, str):
        return "the system is no string"
    # Messages that begin with what the system says have it already.
    if not system.strip() or turns[0][0] == "system":
        return turns
    return [("system", system), *turns]


def _said(record: Mapping) -> list[tuple[str, str]] | str:
    """The turns that a record has besides what stands in its field ``system``."""
    for name, (speaker, said) in _TURNS.items():
        if name in record:
            return _of_messages(record[name], name, speaker, said)
    prompt = next((record[name] for name in _PROMPTS if name in record), None)
    response = next((record[name] for name in _RESPONSES if name in record), None)
    if not isinstance(prompt, str) or not isinstance(response, str):
        return (
            "has no prompt and response, and no messages"
            if prompt is None or response is None
            else "the prompt or the response is no string"
        )
    if not response.strip():
        return "the response is empty"
    more = record.get("input", "")
    if not isinstance(more, str):
        return "the input is no string"
    if more.strip():
        prompt = f"{prompt.strip()}\n\n{more.strip()}"
    return [("user", prompt), (ASSISTANT, response)]


def _of_messages(messages: object, name: str, speaker: str, said: str) -> list | str:
    if not isinstance(messages, list) or not messages:
        return f"{name} is no list of messages"
    turns = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get(said), str):
            return f"a message of {name} has no {said!r} that is a string"
        who = message.get(speaker)
        who = _SPEAKERS.get(who, who) if isinstance(who, str) else who
        if not isinstance(who, str) or who not in MARKS:
            return f"a message of {name} is by {who!r}, not by {', '.join(MARKS)}"
        turns.append((who, message[said]))
    if not any(who == ASSISTANT and text.strip() for who, text in turns):
        return f"{name} has no response"
    return turns
