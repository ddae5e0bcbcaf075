"""Conversation as the text of a document, with the places of its responses."""

from collections.abc import Sequence
from typing import NamedTuple

MARKS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
"""Text before each turn, by who speaks, where a tokenizer has no chat template."""

ASSISTANT = "assistant"

Turns = Sequence[tuple[str, str]]
"""Turns of a conversation, each (who speaks, what)."""

Span = tuple[int, int]
"""First character of a response, and the one behind it."""


class Conversation(NamedTuple):
    """Text of a conversation.

    Attributes:
      text: all of it.
      responses: places in it of what the assistant says, with what ends its turns.
    """

    text: str
    responses: tuple[Span, ...]


def marked(turns: Turns) -> Conversation:
    """The conversation with a mark before each turn.

    A response ends with its text: what follows is the end of the document, or the next turn.  An
    empty one is none: nobody learns to say nothing.
    """
    text, responses = "", []
    for speaker, said in turns:
        text += f"{'' if not text else chr(10)}{MARKS[speaker]}\n"
        begin = len(text)
        text += said.strip()
        if speaker == ASSISTANT and said.strip():
            responses.append((begin, len(text)))
    return Conversation(text, tuple(responses))


def marked_prompt(turns: Turns) -> str:
    """The conversation up to where the assistant begins to speak."""
    return marked([*turns, (ASSISTANT, "")]).text


def write_spans(responses: Sequence[Span]) -> str:
    """Places as text, such as ``"17:25 60:71"``."""
    return " ".join(f"{begin}:{end}" for begin, end in responses)


def read_spans(text: str) -> list[Span]:
    """Places of :func:`write_spans`."""
    pairs = (span.split(":") for span in text.split())
    return [(int(begin), int(end)) for begin, end in pairs]
