"""Chat templates against transformers, and the places of responses."""

import json

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from dynmoe_jax import config
from dynmoe_jax.data import DataError, TrainStream, open_tokenizer, prepare
from dynmoe_jax.data.chat.template import ChatTemplate, TemplateFailure, template_of
from dynmoe_jax.data.preparation.prepare import template_for
from dynmoe_jax.data.sources.document import Broken
from dynmoe_jax.data.sources.registry import read_documents

# The forms of well-known models, shortened where they speak of tools.
TEMPLATES = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama_2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}",
    "llama_3": "{%- set ns = namespace(first=true) -%}{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if ns.first %}{% set content = bos_token + content %}{% set ns.first = false %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}",
    "gemma": "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "marked": "{%- for message in messages -%}{%- if message.role == 'assistant' -%}"
    "{% generation %}{{ message.content | tojson }}{% endgeneration %};"
    "{%- else -%}{{ message.role }}: {{ message.content }} -> {%- endif -%}{%- endfor -%}",
}
TURNS = [
    ("user", "Hi <there>"),
    ("assistant", "Hello é猫"),
    ("user", "Bye"),
    ("assistant", "So long"),
]


def folder_of(path, template, **more):
    """A byte-level tokenizer in Hugging Face's format with a template."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    path.mkdir(parents=True)
    made.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template, **more}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("system", [False, True])
def test_text_is_that_of_transformers(tmp_path, name, prompt, system):
    folder = folder_of(tmp_path / "t", TEMPLATES[name])
    turns = [("system", "Be brief.")] * system + (TURNS[:3] if prompt else TURNS)
    messages = [{"role": speaker, "content": said} for speaker, said in turns]
    oracle = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt
    )
    assert template_of(open_tokenizer(folder)).render(turns, prompt=prompt) == oracle


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        ("chatml", ["Hello é猫<|im_end|>", "So long<|im_end|>"]),
        ("llama_2", [" Hello é猫 </s>", " So long "]),
        ("llama_3", ["Hello é猫<|eot_id|>", "So long<|eot_id|>"]),
        ("zephyr", ["Hello é猫</s>", "So long"]),
        ("gemma", ["Hello é猫<end_of_turn>", "So long<end_of_turn>"]),
        ("marked", ['"Hello é猫";', '"So long";']),
    ],
)
def test_a_response_is_what_the_text_grows_by(name, learned):
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    text, spans = template.conversation(TURNS)
    assert [text[begin:end] for begin, end in spans] == learned
    # Every document has these already.
    assert not text.startswith("<s>")
    assert not text.endswith("</s>")


def test_a_template_that_lies_beside_the_settings_comes_first(tmp_path):
    folder = folder_of(tmp_path / "t", "old")
    (folder / "chat_template.jinja").write_text("new")
    assert template_of(open_tokenizer(folder)).render(TURNS) == "new"
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}]
    assert template_of(open_tokenizer(folder_of(tmp_path / "n", named))).render(TURNS) == "y"
    assert template_of(open_tokenizer(folder_of(tmp_path / "none", None))) is None


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% set n = namespace() %}{% set n.__init__ = 1 %}{{ n }}",
        "{{ namespace(_a=1) }}",
        "{{ dict.mro() }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ cycler('a').next() }}",
        "{% include '/etc/passwd' %}",
        "{{ range(10 ** 9) | list }}",
        "{{ strftime_now('%Y') }}",
        "{{ messages[0]['nothing']['more'] }}",
        "{% set n = 10 ** 17 %}{{ messages[0].content * n }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source):
    with pytest.raises(TemplateFailure, match="the chat template"):
        ChatTemplate(source, {}).render(TURNS)


def test_a_prompt_that_no_tokenizer_takes_is_refused():
    with pytest.raises(TemplateFailure, match="holds a lone surrogate"):
        ChatTemplate("\ud800", {}).prompt(TURNS)


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{% break %}", "{% for a in [1] %}" * 40, "{{ 10**9999 }}", "{{ [1]|random }}"],
)
def test_what_is_no_template_is_refused(source):
    with pytest.raises(DataError, match="chat template cannot be read"):
        ChatTemplate(source, {})


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return config.Data(sources=f"instructions:{path}", seq_len=64, virtual_shards=2)


def test_what_a_template_does_not_take_is_broken_by_its_line(tmp_path):
    say = lambda *turns: {"messages": [{"role": r, "content": s} for r, s in turns]}  # noqa: E731
    data = lines(tmp_path / "x.jsonl", say(*TURNS), say(*TURNS[1:]), {"prompt": "a"})
    alternating = ChatTemplate(TEMPLATES["llama_2"], {"bos_token": "<s>", "eos_token": "</s>"})
    good, refused, empty = read_documents(data, alternating)
    assert good.responses
    assert isinstance(refused, Broken)
    assert (refused.origin, empty.origin) == tuple(f"{tmp_path / 'x.jsonl'}:{n}" for n in (2, 3))
    assert "roles must alternate" in refused.reason
    # A template that writes earlier responses otherwise: nobody can tell where the first one is.
    last = ChatTemplate(
        "{% for m in messages %}{{ '!' if loop.last else '' }}{{ m.content }};{% endfor %}", {}
    )
    found = list(read_documents(data, last))
    assert "otherwise when more is said" in found[0].reason
    silent = ChatTemplate(
        "{% for m in messages if m.role == 'user' %}{{ m.content }};{% endfor %}", {}
    )
    assert "leaves a response out" in next(iter(read_documents(data, silent))).reason


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """The first batch of a conversation in ChatML and its tokenizer."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = open_tokenizer(folder_of(folder / "t", TEMPLATES["chatml"]))
    record = {"messages": [{"role": r, "content": s} for r, s in TURNS]}
    data = lines(folder / "x.jsonl", record, {"prompt": "p", "response": "r"})
    prepared = prepare(data, folder / "data", template_of(tokenizer))
    with TrainStream(prepared, tokenizer, data, 2, 0, arrays=("responses",)) as made:
        return next(made), tokenizer


def test_tokens_of_responses_alone_are_learned(stream):
    batch, tokenizer = stream
    assert set(np.unique(batch["responses"])) == {0, 1}
    learned = batch["targets"][batch["responses"] == 1]
    special = {text: token for token, text in tokenizer.special_tokens.items()}
    text = tokenizer.decode(learned)
    # What ends a turn is learned; EOS behind it, and all that calls somebody to speak, is not.
    assert special["<|im_end|>"] in learned
    assert special["<|im_start|>"] not in learned
    assert tokenizer.eos_id not in learned
    assert set(text) <= set("Hello é猫So longr")


def test_preparations_of_unlike_templates_are_unlike(tmp_path):
    data = lines(
        tmp_path / "x.jsonl", {"prompt": "p", "response": "r"}, {"prompt": "q", "response": "s"}
    )
    plain = prepare(data, tmp_path)
    templates = [ChatTemplate(TEMPLATES[name], {}) for name in ("chatml", "gemma")]
    found = [prepare(data, tmp_path, template) for template in templates]
    assert len({each.fingerprint for each in (plain, *found)}) == 3
    assert b"<|im_start|>" in found[0].open_train("x")[0]["text"]
    # Of other sources a template changes nothing, and none is looked for.
    assert template_for(config.Data(sources="python"), None) is None
    text = config.Data(sources=f"text:{tmp_path}/x.jsonl")
    assert prepare(text, tmp_path).fingerprint == prepare(text, tmp_path, templates[0]).fingerprint
