"""Chat template of a tokenizer: conversations as text in the form that a model was taught.

A response's place is where the text grows when it is spoken: from the text of all turns before it,
with what calls the assistant to speak, to the text with it.  Both must be beginnings of the whole.
"""

import functools
import hashlib
from collections.abc import Mapping

import jinja2

from dynmoe_jax.data.chat.conversation import ASSISTANT, Conversation, Span, Turns
from dynmoe_jax.data.chat.sandbox import compiled
from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.sources.document import unusable

_COMPILING = (RecursionError, SyntaxError, ValueError, MemoryError)
"""What else compiling raises: Jinja makes Python of a template, which may nest too deep, break
outside of a loop or hold a number of too many digits."""


class TemplateFailure(ValueError):
    """A conversation that a template does not take; says why in a few words."""


class ChatTemplate:
    """A chat template.

    Args:
      source: in Jinja's language.
      tokens: texts of the tokenizer's named tokens, such as ``bos_token``.

    Attributes:
      digest: hex, of source and tokens.

    Raises:
      DataError: it is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]):
        self._tokens = dict(tokens)
        try:
            self._template = compiled(source)
        except (jinja2.exceptions.TemplateError, *_COMPILING) as error:
            raise DataError(
                f"the tokenizer's chat template cannot be read: {_shortly(error)}."
            ) from error
        content = repr((source, sorted(self._tokens.items())))
        self.digest = hashlib.sha256(content.encode()).hexdigest()

    def render(self, turns: Turns, *, prompt: bool = False) -> str:
        """Text of a conversation, as transformers' ``apply_chat_template`` gives it.

        Args:
          turns: each (who speaks, what).
          prompt: whether what calls the assistant to speak stands at the end.

        Raises:
          TemplateFailure: the template does not take it.
        """
        messages = [{"role": speaker, "content": said} for speaker, said in turns]
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                **self._tokens,
            )
        except (jinja2.exceptions.TemplateError, ArithmeticError, LookupError) as error:
            raise TemplateFailure(f"the chat template refuses it: {_shortly(error)}") from error
        except (AttributeError, TypeError, ValueError, RecursionError, MemoryError) as error:
            raise TemplateFailure(f"the chat template fails: {_shortly(error)}") from error

    def conversation(self, turns: Turns) -> Conversation:
        """Text of a document, without the tokens that begin and end every one, and its responses.

        Raises:
          TemplateFailure: the template does not take it, or changes what was said before when more
            is said, so that the places of responses cannot be told.
        """
        text = self.render(turns)
        spans = [
            self._response(text, turns[: number + 1])
            for number, (speaker, said) in enumerate(turns)
            if speaker == ASSISTANT and said.strip()
        ]
        begin = len(text) - len(self._without_bos(text))
        end, eos = len(text), self._tokens.get("eos_token")
        if eos and text.rstrip().endswith(eos):
            end = len(text.rstrip()) - len(eos)
        places = [(max(b, begin) - begin, min(e, end) - begin) for b, e in spans]
        if not places or any(first >= last for first, last in places):
            raise TemplateFailure("the chat template leaves a response out")
        return Conversation(text[begin:end], tuple(places))

    def prompt(self, turns: Turns) -> tuple[str, bool]:
        """Text up to where the assistant speaks, without BOS; and whether BOS stands before it.

        Raises:
          TemplateFailure: the template does not take it.
        """
        text = self.render(turns, prompt=True)
        if reason := unusable(text):
            raise TemplateFailure(f"the text of the chat template {reason}")
        without = self._without_bos(text)
        return without, without != text

    def _without_bos(self, text: str) -> str:
        return text.removeprefix(self._tokens.get("bos_token", ""))

    def _response(self, text: str, turns: Turns) -> Span:
        """Place of the last of some turns in the text of all."""
        before = self.render(turns[:-1], prompt=True)
        spoken = self.render(turns)
        if spoken != text:
            spoken = spoken.rstrip()
        if not (text.startswith(spoken) and spoken.startswith(before)):
            raise TemplateFailure(
                f"the chat template writes what was said before response {turns[-1][1][:20]!r} "
                "otherwise when more is said"
            )
        return len(before), len(spoken.rstrip())


@functools.lru_cache(maxsize=8)
def _template(source: str, tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(source, dict(tokens))


def template_of(tokenizer: object) -> ChatTemplate | None:
    """The chat template of a tokenizer; None where it has none.

    Raises:
      DataError: what it has is none.
    """
    found = getattr(tokenizer, "chat_template", None)
    if found is None:
        return None
    source, tokens = found
    return _template(source, tuple(sorted(tokens.items())))


def _shortly(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160].rstrip(".")
