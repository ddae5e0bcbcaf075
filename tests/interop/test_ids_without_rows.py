"""A tokenizer of twelve ids, and a model whose embedding has eight rows."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from dynmoe_jax import config
from dynmoe_jax.data import DataError, TrainStream, heldout_batches
from dynmoe_jax.evaluation.scoring.requests import Request
from dynmoe_jax.evaluation.scoring.scoring import Scorer
from dynmoe_jax.evaluation.scoring.tree_writing import Prompt, TreeWriter
from dynmoe_jax.inference.generate import Generator
from dynmoe_jax.inference.sampling import Sampling
from dynmoe_jax.inference.writer import Writer
from dynmoe_jax.interop.import_model import import_model
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.runs.text import load_text
from dynmoe_jax.training.initial_model import with_initial_model
from tests.interop.small_models import settings_of, tensors_of, write

LLAMA = "LlamaForCausalLM"
WORDS = ["<s>", "</s>", "a", "b", "c", "d", "e", " "]
MORE = ["<|x|>", "<|y|>", "f", "g"]
NO_ROW = r"token 10 \('f'\) has no row in the embedding.*8 rows"


def write_tokenizer(folder, words):
    made = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[]))
    made.decoder = decoders.Fuse()
    special = [word for word in words if len(word) > 1]
    made.add_special_tokens([AddedToken(word, special=True) for word in special])
    made.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def imported(folder, words=(*WORDS, *MORE)):
    """The folder of a run of that model."""
    folder.mkdir(exist_ok=True)
    tensors = tensors_of(LLAMA, vocab_size=8)
    write(folder / "hf", settings_of(LLAMA, vocab_size=8), tensors)
    write_tokenizer(folder / "hf", words)
    import_model(folder / "hf", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return imported(tmp_path_factory.mktemp("imported"))


def test_it_is_said_at_import(tmp_path, capsys):
    imported(tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "The tokenizer has 12 ids, the embedding of the model 8 rows" in said
    assert "'<|x|>'" in said
    assert "'g'" in said
    imported(tmp_path / "other", WORDS)
    assert "ids" not in capsys.readouterr().out


def test_text_with_such_an_id_is_refused_and_other_text_is_read(run):
    _, decoder, tokenizer = load_run(run)
    assert tokenizer.encode("abc de").tolist() == [2, 3, 4, 7, 5, 6]
    assert tokenizer.vocab_size == 8
    with pytest.raises(DataError, match=NO_ROW):
        tokenizer.encode("abcf")
    with pytest.raises(DataError, match=r"token 8 \('<\|x\|>'\)"):
        tokenizer.encode("a<|x|>")
    writer = Writer(decoder, tokenizer, Sampling(max_tokens=2), copy_layers=False)
    for ask in (writer.check, lambda text: writer.write([text])):
        with pytest.raises(DataError, match=NO_ROW):
            ask("bf")


def test_ids_themselves_are_refused(run):
    """Ids from elsewhere, which would read the last row."""
    _, decoder, _ = load_run(run)
    generator, scorer = Generator(decoder, copy_layers=False), Scorer(decoder, 64, 32)
    writer = TreeWriter(decoder, 64, 8, 1)
    for ask in (
        lambda ids: generator.write([ids], [2], Sampling(), vocab_size=8, stop_ids=[1]),
        lambda ids: next(iter(scorer.answer([Request((2, 3), 1), Request(tuple(ids), 1)]))),
        lambda ids: next(iter(writer.write([Prompt(tuple(ids), 2, lambda ids: None)]))),
    ):
        with pytest.raises(DataError, match=r"token 10 has no row in the embedding.*8 rows"):
            ask([2, 10, 3])
        with pytest.raises(DataError, match="token -1 has no row"):
            ask([2, -1, 3])


def fine_tuning(run, folder, *texts, **changes):
    """Settings of a run that begins with the model, and text for it."""
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    cfg = config.Config(
        data=config.Data(sources=f"text:{folder}/*.txt", seq_len=8, heldout_fraction=0.3),
        train=config.Train(init_from=str(run), batch_size=8),
        evaluation=config.Evaluation(prompt="ab"),
    )
    cfg = dataclasses.replace(cfg, **changes)
    return with_initial_model(cfg, folder / "workdir"), folder / "workdir"


def batches(cfg, workdir):
    """Batches as training would read them: one, and the held-out ones of each domain."""
    prepared, tokenizer = load_text(cfg, workdir, None)
    with TrainStream(prepared, tokenizer, cfg.data, 8, 0) as stream:
        yield next(stream)
    for domain in prepared.domains:
        yield from heldout_batches(prepared, tokenizer, cfg.data, domain, 8, 9)


PLAIN = [f"abc {'d' * n} e" for n in range(12)]


def test_fine_tuning_works_if_the_data_never_has_such_an_id(run, tmp_path):
    read = list(batches(*fine_tuning(run, tmp_path / "text", *PLAIN)))
    assert len(read) > 1
    assert max(int(batch["targets"].max()) for batch in read) < 8
    # The tokenizer that lies there is the model's own.
    _, tokenizer = load_text(*fine_tuning(run, tmp_path / "more", *PLAIN), None)
    assert tokenizer.fingerprint == load_run(run)[2].fingerprint


def test_data_with_such_an_id_is_refused_with_its_name(run, tmp_path):
    with pytest.raises(DataError, match=rf"\d+\.txt.*: {NO_ROW}"):
        list(batches(*fine_tuning(run, tmp_path / "text", *[f"{text}f" for text in PLAIN])))


def test_a_prompt_for_the_end_of_training_is_refused_at_its_beginning(run, tmp_path):
    changes = {"evaluation": config.Evaluation(prompt="bf")}
    with pytest.raises(config.ConfigError, match=r"config\.evaluation\.prompt='bf'.*token 10"):
        load_text(*fine_tuning(run, tmp_path / "text", *PLAIN, **changes), None)


def test_documents_need_rows_for_the_tokens_around_them(tmp_path):
    words = [*WORDS[2:], *MORE[2:], "h", "i", "<s>", "</s>"]
    run = imported(tmp_path, words)
    with pytest.raises(config.ConfigError, match=r"token 10 \('<s>'\), which begins.*no row"):
        load_text(*fine_tuning(run, tmp_path / "text", *PLAIN), None)
    decoder, tokenizer = load_run(run)[1:]
    with pytest.raises(DataError, match="token 10 has no row"):
        Writer(decoder, tokenizer, Sampling(), begin_with_bos=True).write(["a"])


def test_a_model_that_begins_anew_still_needs_them_all(run, tmp_path):
    cfg, workdir = fine_tuning(run, tmp_path / "text", *PLAIN)
    cfg = dataclasses.replace(cfg, train=config.Train())
    with pytest.raises(config.ConfigError, match=r"vocab_size=8 is smaller than the 12 tokens"):
        load_text(cfg, workdir, None)


def test_the_bytes_of_tokens_are_there_for_each(run):
    tokenizer = load_run(run)[2]
    assert len(tokenizer.token_bytes_V) >= tokenizer.vocab_size
    assert np.sum(tokenizer.token_bytes_V[tokenizer.encode("abc")]) == 3
