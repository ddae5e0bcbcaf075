"""Our model of the harness and the harness's own ``hf`` model give the same answers and points.

A tiny Llama with random weights in both; `python -m benchmarks.evaluation` compares a real one.
"""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs the extra eval: pip install -e '.[eval]'")
pytest.importorskip("torch", reason="needs the extra bench: pip install -e '.[bench]'")
pytest.importorskip("transformers", reason="needs the extra bench: pip install -e '.[bench]'")

import jax.numpy as jnp
import lm_eval.tasks as lm_eval_tasks
import torch
import transformers
from flax import nnx
from lm_eval.models.huggingface import HFLM

from benchmarks.evaluation import SharedTokenizer, largest_difference
from benchmarks.evaluation_cases import Asked, Case, answers, points, tasks_of
from benchmarks.evaluation_parity import compare
from dynmoe_jax.evaluation.harness.answers import AnswerFile
from dynmoe_jax.evaluation.harness.model import HarnessModel
from dynmoe_jax.evaluation.scoring.scoring import Scorer
from dynmoe_jax.evaluation.scoring.tree_writing import TreeWriter
from dynmoe_jax.model import Decoder

FOLDERS = ("piqa", "hellaswag", "arc", "commonsense_qa", "bbh")
TASKS = (
    "piqa", "hellaswag", "arc_easy", "commonsense_qa",
    "bbh_fewshot_boolean_expressions", "bbh_fewshot_object_counting",
)  # fmt: skip
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def asked(items):
    return Asked("tiny", str(items), TASKS, 8, 1, NEW_TOKENS, 1024)


@pytest.fixture(scope="module")
def tokenizer(items):
    """A byte-level tokenizer in Hugging Face's form."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [path.read_text(encoding="utf-8") for path in sorted(items.rglob("*.json"))]
    made.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="module")
def model(settings, tokenizer):
    moe = dataclasses.replace(settings.model.moe, every_n_layers=0)
    return dataclasses.replace(
        settings.model,
        hidden_width=24,
        vocab_size=len(tokenizer),
        moe=moe,
        dtype="float32",
        tie_embeddings=True,
    )


@pytest.fixture(scope="module")
def decoder(model):
    """Hides the one with experts."""
    random = np.random.default_rng(11)
    structure, state = nnx.split(nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0))))
    leaves = [
        (path, leaf.replace(jnp.asarray(random.normal(scale=0.3, size=leaf.shape), jnp.float32)))
        for path, leaf in state.flat_state()
    ]
    return nnx.merge(structure, nnx.from_flat_state(leaves))


@pytest.fixture(scope="module")
def llama(decoder, model):
    """The same weights in transformers."""
    values = {
        ".".join(map(str, path)): np.asarray(leaf[...])
        for path, leaf in nnx.state(decoder, nnx.Param).flat_state()
    }
    layer = {name.removeprefix("groups.layers.0."): value for name, value in values.items()}
    width = model.width
    halves = layer["feed_forward.gate_up_D2F"].reshape(model.num_layers, width, 2, -1)
    weights = {
        "model.embed_tokens.weight": values["embedding_VD"],
        "lm_head.weight": values["embedding_VD"],
        "model.norm.weight": values["norm.scale"],
    }
    for i in range(model.num_layers):
        matrices = {
            "self_attn.q_proj": layer["attention.query_DHW"][i].reshape(width, -1).T,
            "self_attn.k_proj": layer["attention.key_DGW"][i].reshape(width, -1).T,
            "self_attn.v_proj": layer["attention.value_DGW"][i].reshape(width, -1).T,
            "self_attn.o_proj": layer["attention.output_HWD"][i].reshape(-1, width).T,
            "mlp.gate_proj": halves[i][:, 0].T,
            "mlp.up_proj": halves[i][:, 1].T,
            "mlp.down_proj": layer["feed_forward.down_FD"][i].T,
            "input_layernorm": layer["attention_norm.scale"][i],
            "post_attention_layernorm": layer["feed_forward_norm.scale"][i],
        }
        weights |= {f"model.layers.{i}.{name}.weight": value for name, value in matrices.items()}
    shape = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=width,
        intermediate_size=model.hidden_width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_width,
        max_position_embeddings=model.max_seq_len,
        rms_norm_eps=model.norm_epsilon,
        rope_theta=model.rope_theta,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    made = transformers.LlamaForCausalLM(shape).eval()
    made.load_state_dict({n: torch.from_numpy(v.copy()) for n, v in weights.items()})
    return made


@pytest.fixture(scope="module")
def tasks(asked):
    folder = str(next(iter(lm_eval_tasks.__path__)))
    index = lm_eval_tasks.TaskManager(
        include_path=[f"{folder}/{name}" for name in FOLDERS], include_defaults=False
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynmoe_jax.evaluation.harness.local_tasks._manager", lambda: index)
        return tasks_of(asked)


@pytest.fixture(scope="module")
def found(tasks, asked, decoder, llama, tokenizer, tmp_path_factory):
    """{task: (what the harness found with ours, with its own)}"""
    mine = SharedTokenizer(tokenizer)
    kept = AnswerFile(tmp_path_factory.mktemp("answers") / "answers.jsonl", "tiny")
    ours = HarnessModel(
        Scorer(decoder, 512, asked.max_length),
        TreeWriter(decoder, 512, mine.vocab_size, mine.eos_id),
        mine,
        kept,
        NEW_TOKENS,
    )

    class Theirs(HFLM):
        max_gen_toks = NEW_TOKENS

    theirs = Theirs(
        pretrained=llama,
        tokenizer=tokenizer,
        batch_size=4,
        device="cpu",
        max_length=asked.max_length,
    )

    def run(model, parts):
        case = Case(lambda: model, parts, asked.limit)
        case()
        return case.found

    return {name: (run(ours, parts), run(theirs, parts)) for name, parts in tasks.items()}


@pytest.mark.parametrize("task", TASKS)
def test_answers_and_points_are_the_same(found, task):
    ours, theirs = found[task]
    largest, others = largest_difference(answers(ours), answers(theirs))
    assert others == 0
    assert largest < 1e-3
    assert points(ours) == points(theirs)
    (record,) = compare(answers(ours), answers(theirs), points(ours), points(theirs))
    assert (record["task"], record["other_answers"]) == (task, 0)
    assert record["largest_log_prob_difference"] == largest


def test_something_was_asked(found):
    numbers = [answers(found[task][0])[task] for task in TASKS]
    assert [len(number) for number in numbers] == [16, 32, 32, 40, 2, 2]
    texts = [text for number in numbers[4:] for text in number]
    assert any(texts)
    values = [log_prob for number in numbers[:4] for log_prob, _ in number]
    assert np.std(values) > 1
