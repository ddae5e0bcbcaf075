"""The command, beside full forward passes of each document alone."""

import itertools
import json
import math
import re
import shutil
import sys

import jax
import numpy as np
import pytest

from dynmoe_jax.evaluation import __main__ as command

WINDOW = 32


@pytest.fixture
def run(monkeypatch, capsys):
    """flags -> (exit code, what was printed)."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, flags)])
        code = command.main()
        return code, capsys.readouterr().out.replace("\n", " ")

    return call


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """(sources, documents by domain)."""
    words = {"one": "A sentence of the first domain. ", "two": "Which words, of the second? "}
    documents = {name: [word * n for n in (1, 3, 2)] for name, word in words.items()}
    folder = tmp_path_factory.mktemp("texts")
    for name, found in documents.items():
        lines = [json.dumps({"text": text, "domain": name}) for text in found]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return f"jsonl:{folder}/*.jsonl", documents


def pieces_of(documents, tokenizer):
    """Token pairs of every document as rows of ``WINDOW`` cut them."""
    pieces, at = [], 0
    for text in documents:
        ids = [tokenizer.bos_id, *tokenizer.encode(text).tolist(), tokenizer.eos_id]
        pairs = list(itertools.pairwise(ids))
        while pairs:
            room = WINDOW - at % WINDOW
            pieces.append(pairs[:room])
            at += len(pieces[-1])
            pairs = pairs[room:]
    return pieces


def by_bayes_rule(pieces, decoders, prior_J):
    """Nats of all pieces under the ensemble, in float64, from whole products of likelihoods."""
    run, nats = jax.jit(lambda decoder, tokens: decoder(tokens).logits[0]), 0.0
    for piece in pieces:
        tokens = np.zeros((1, WINDOW), np.int32)
        tokens[0, : len(piece)] = [read for read, _ in piece]
        probs_JL = []
        for decoder in decoders:
            logits_LV = np.asarray(run(decoder, tokens), np.float64)
            probs_LV = np.exp(logits_LV) / np.exp(logits_LV).sum(-1, keepdims=True)
            probs_JL.append([probs_LV[i, target] for i, (_, target) in enumerate(piece)])
        # Of the whole piece the mixture of what its members say, which no posterior is needed for.
        nats -= math.log(prior_J @ np.prod(probs_JL, axis=1))
    return nats


def test_the_ensemble_of_two_shapes_is_the_mixture_of_both(
    run, workdir, other, texts, tokenizer, decoders, tmp_path
):
    sources, documents = texts
    (tmp_path / "prior.json").write_text('{"prior": [1, 3]}')
    flags = [f"--ensemble={workdir},{other}", f"--ensemble_text={sources}", f"--window={WINDOW}"]
    flags += [f"--prior={tmp_path}/prior.json", f"--output={tmp_path}"]
    code, printed = run(*flags)
    assert code == 0
    record = json.loads((tmp_path / "ensemble.json").read_text())
    for name, found in documents.items():
        pieces, domain = pieces_of(found, tokenizer), record["domains"][name]
        assert domain["documents"] == len(pieces)
        assert domain["tokens"] == sum(map(len, pieces))
        expected = by_bayes_rule(pieces, decoders, np.array([0.25, 0.75]))
        assert domain["nll"] == pytest.approx(expected, rel=1e-5)
        assert domain["bytes"] == sum(len(text.encode()) for text in found)
        assert domain["loss"] <= domain["loss_bound"]
        assert sum(domain["posterior"]) == pytest.approx(1)
    assert record["prior"] == [0.25, 0.75]
    page = (tmp_path / "ensemble.html").read_text()
    assert workdir.name in page
    assert "How soon is the domain known?" in page
    assert "best member" in printed


def test_members_that_are_one_model_are_that_model(run, workdir, texts, tmp_path):
    twin = tmp_path / "twin"
    shutil.copytree(workdir, twin)
    flags = f"--ensemble={workdir},{twin}", f"--ensemble_text={texts[0]}", f"--output={tmp_path}"
    assert run(*flags, "--prior=estimate", "--window=32")[0] == 0
    record = json.loads((tmp_path / "ensemble.json").read_text())
    total = record["all"]
    assert total["loss"] == pytest.approx(total["loss_by_member"][0], rel=1e-6)
    assert record["prior"] == pytest.approx([0.5, 0.5])
    assert record["domains"]["one"]["documents_of_prior"] > 0


MISTAKES = {
    ("--ensemble={0}",): "--ensemble={0} must name two runs or more",
    ("--ensemble={0},{0}",): "names {0} twice; name it once",
    ("--ensemble={0},{0}/../{0.name}",): "{0.name} twice; name it once",
    ("--ensemble={0},{1}", "--workdir={0}"): "does not go with --workdir; leave that out",
    ("--ensemble={0},{1}", "--routing"): "does not go with --routing",
    ("--ensemble={0},{1}", "--ensemble_top_k=3"): "--ensemble_top_k=3 must be from 1 to the 2",
    ("--ensemble={0},{1}", "--prior=/none"): "--prior=/none cannot be read (No such file",
    ("--ensemble={0},{1}", "--ensemble_text=text:/none"): "matches no file",
    ("--ensemble={0},{2}", "--ensemble_text=python"): "have two tokenizers; members must share",
    ("--ensemble={0},/none", "--ensemble_text=python"): "'/none' holds no run",
    ("--workdir={0}", "--prior=estimate"): "--prior has no effect without --ensemble",
    ("--routing",): "--workdir is missing; name the folder of a run",
}


@pytest.mark.parametrize("flags", MISTAKES, ids=" ".join)
def test_mistakes_are_one_sentence(run, workdir, other, stranger, flags):
    folders = workdir, other, stranger
    code, printed = run(*(flag.format(*folders) for flag in flags))
    assert code == 2
    squeezed = lambda text: re.sub(r"\s+", "", text)  # noqa: E731
    assert squeezed(MISTAKES[flags].format(*folders)) in squeezed(printed)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{}", "holds no list of numbers called 'prior'"),
        ("no JSON", "holds no list of numbers"),
        pytest.param("[" * 10**5, "holds no list of numbers", id="nested"),
        pytest.param(f'{{"prior": [1{400 * "0"}, 1]}}', "holds no list of numbers", id="large"),
        ('{"prior": [1, 2, 3]}', "which must be 2 numbers of at least 0"),
        ('{"prior": [1, -1]}', "which must be 2 numbers"),
        ('{"prior": [0, 0]}', "which must be 2 numbers"),
    ],
)
def test_a_file_that_holds_no_prior_is_refused(run, workdir, other, tmp_path, text, sentence):
    (tmp_path / "prior.json").write_text(text)
    code, printed = run(f"--ensemble={workdir},{other}", f"--prior={tmp_path}/prior.json")
    assert code == 2
    assert sentence in printed
