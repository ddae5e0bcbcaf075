"""The command line of generation."""

import pytest

from dynmoe_jax.config import ConfigError
from dynmoe_jax.inference.arguments import parse, read_prompts


def test_flags_become_settings():
    flags = ["--workdir=runs/a", "--prompt=one", "--prompt=two", "--top_k=5", "--stop=.", "--best"]
    asked = parse([*flags, "--show-experts"], interactive=False)
    assert asked.prompts == ["one", "two"]
    assert (asked.sampling.top_k, asked.sampling.temperature) == (5, 0.8)
    assert (asked.stops, asked.best, asked.show_experts, asked.stream) == (
        (".",),
        True,
        True,
        False,
    )


def test_without_a_prompt_somebody_is_asked():
    assert parse(["--workdir=a"], interactive=True).prompts is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to continue: give --prompt=TEXT"),
        (["--prompt=a", "--temprature=1"], "--temprature is not a flag; did you mean --temp"),
        (["a"], "'a' is no flag; a text to continue is --prompt='a'"),
        (["--prompt=a", "--nucleus=2"], "--nucleus=2.0 must be at most 1"),
        (["--prompt=a", "--num_samples=0"], "--num_samples=0 must be at least 1"),
        (["--prompt=a", "--stop="], "--stop='' would end every text"),
        (["--prompt=a", "--stream", "--num_samples=2"], "--num_samples=2 does not go with"),
        (["--prompt=a", "--top_k=few"], "--top_k: invalid int value"),
        (["--prompts_file=missing.txt"], "--prompts_file=missing.txt cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse(["--workdir=runs/a", *flags], interactive=False)


def test_prompts_of_files(tmp_path):
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("one\n\ntwo words \n", encoding="utf-8")
    assert read_prompts(text) == ["one", "two words "]
    lines.write_text('"one\\nmore"\n{"prompt": "two"}\n', encoding="utf-8")
    assert read_prompts(lines) == ["one\nmore", "two"]
    lines.write_text('"one"\n{"text": "two"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2, must be a string, or a record with"):
        read_prompts(lines)
    text.write_text("\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--workdir is missing; name the folder of a run"),
        (["--workdir=a", "--prior=x"], "--prior has no effect without --ensemble"),
        (["--workdir=a", "--ensemble=a,b"], "--ensemble does not go with --workdir"),
        (["--ensemble=a,b", "--prior=estimate"], "--prior=estimate needs text; estimate it with"),
        (["--ensemble=a,b", "--ensemble_top_k=3"], "must be from 1 to the 2 members"),
    ],
)
def test_mistakes_about_ensembles_are_one_sentence(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse(["--prompt=a", *flags], interactive=False)
    asked = parse(["--prompt=a", "--ensemble=a,b"], interactive=False)
    assert [str(member) for member in asked.members] == ["a", "b"]
    assert asked.workdir == asked.members[0]
