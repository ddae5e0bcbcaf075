"""Conversation with a model that was taught to answer, in the form that it was taught."""

from dynmoe_jax.config import ConfigError
from dynmoe_jax.data import Tokenizer
from dynmoe_jax.data.chat.conversation import ASSISTANT, MARKS, Turns, marked_prompt
from dynmoe_jax.data.chat.template import TemplateFailure, template_of


class Chat:
    """Form of conversations: the tokenizer's chat template, or the marks of this project.

    Args:
      tokenizer: of the model.
      system: what stands before every conversation; empty for nothing.

    Attributes:
      stops: strings that end a response, besides the tokens that end any text.
      begins_with_bos: whether BOS stands before a prompt; None: as the tokenizer says.

    Raises:
      ConfigError: the template does not take conversations like these.
      DataError: the template cannot be read.
    """

    def __init__(self, tokenizer: Tokenizer, system: str = ""):
        self._before: Turns = [("system", system)] if system else []
        self._template = template_of(tokenizer)
        self.begins_with_bos: bool | None = None
        if self._template is None:
            self.stops: tuple[str, ...] = (f"\n{MARKS['user']}",)
            return
        one = [*self._before, ("user", "?"), (ASSISTANT, "!")]
        try:
            _, self.begins_with_bos = self._template.prompt(one[:-1])
            text, responses = self._template.conversation(one)
        except TemplateFailure as error:
            flag = "--system" if system else "--chat"
            raise ConfigError(f"{flag}: {error}; leave it out.") from error
        begin, end = responses[-1]
        ends = text[begin:end].rpartition("!")[2].strip()
        self.stops = (ends,) if ends else ()

    def prompt(self, turns: Turns) -> str:
        """Text up to where the model speaks, without BOS.

        Raises:
          ConfigError: the template does not take it.
        """
        turns = [*self._before, *turns]
        if self._template is None:
            return marked_prompt(turns)
        try:
            return self._template.prompt(turns)[0]
        except TemplateFailure as error:
            raise ConfigError(f"--chat: {error}; write another prompt.") from error
