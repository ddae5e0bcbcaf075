"""Prompts of conversations: as transformers makes them, or with the marks of instruction data."""

from types import SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerFast

from dynmoe_jax.config import ConfigError
from dynmoe_jax.data import open_tokenizer
from dynmoe_jax.data.chat.conversation import marked
from dynmoe_jax.inference.arguments import parse
from dynmoe_jax.inference.chat import Chat
from tests.data.test_chat_templates import TEMPLATES, folder_of

SAID = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]


@pytest.mark.parametrize(
    ("name", "begins", "stops"),
    [
        ("chatml", False, ("<|im_end|>",)),
        ("llama_2", True, ()),  # ends with EOS, which ends any text
        ("llama_3", True, ("<|eot_id|>",)),
        ("gemma", True, ("<end_of_turn>",)),
    ],
)
def test_a_prompt_is_that_of_transformers_without_bos(tmp_path, name, begins, stops):
    folder = folder_of(tmp_path / "t", TEMPLATES[name])
    chat = Chat(open_tokenizer(folder), "Be brief.")
    messages = [{"role": r, "content": s} for r, s in (("system", "Be brief."), *SAID)]
    oracle = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert "<s>" * begins + chat.prompt(SAID) == oracle
    assert (chat.begins_with_bos, chat.stops) == (begins, stops)


def test_without_a_template_a_prompt_is_the_beginning_of_instruction_data():
    chat = Chat(SimpleNamespace())
    text, responses = marked([*SAID, ("assistant", "See you")])
    assert chat.prompt(SAID) == text[: responses[-1][0]]
    assert chat.begins_with_bos is None
    # The user's next turn ends what the model says.
    assert chat.stops == ("\n<|user|>",)


def test_what_a_template_does_not_take_is_one_sentence(tmp_path):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}x"
    tokenizer = open_tokenizer(folder_of(tmp_path / "t", refusing))
    with pytest.raises(ConfigError, match=r"--system: the chat template refuses it: No system"):
        Chat(tokenizer, "Be brief.")


def test_a_system_prompt_needs_a_chat():
    asked = parse(["--workdir=a", "--chat", "--system=b", "--prompt=c"], interactive=False)
    assert (asked.chat, asked.system) == (True, "b")
    with pytest.raises(ConfigError, match="--system='b' has no effect without --chat"):
        parse(["--workdir=a", "--system=b", "--prompt=c"], interactive=False)
