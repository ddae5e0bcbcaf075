"""The command line: what is accepted, and how every mistake is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from dynmoe_jax import command_line, config
from dynmoe_jax.console import console

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)  # as for train.py: configs import each other


def parse(*arguments):
    return command_line.parse(["train.py", *arguments])


def refusal(*arguments):
    with pytest.raises(config.ConfigError) as caught:
        parse(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_arguments_mean_the_quickstart_in_its_own_folder():
    cfg, workdir = parse()
    assert workdir == Path("runs/quickstart")
    assert cfg.data.sources == "python"


def test_workdir_is_named_after_the_config_file():
    cfg, workdir = parse("--config", "configs/paper/moe_dynamic.py")
    assert workdir == Path("runs/moe_dynamic")
    assert cfg.model.num_layers == 24


def test_workdir_may_be_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse("--workdir", "~/run")[1] == Path("/home/somebody/run")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config.train.steps=7"],
        ["--config.train.steps", "7"],
        ["-config.train.steps=7"],
        ["--config.train.steps=7", "--config=configs/quickstart.py"],
        ["--config=configs/paper/moe_top1.py", "--config.train.steps=7"],
        ["--config.train.steps=3", "--config.train.steps=7"],
    ],
)
def test_setting_is_taken_in_every_spelling_and_order(arguments):
    assert parse(*arguments)[0].train.steps == 7


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("--config.model.tie_embeddings", True),
        ("--config.model.tie_embeddings=true", True),
        ("--config.model.tie_embeddings=False", False),
        ("--noconfig.model.tie_embeddings", False),
    ],
)
def test_switch_is_taken_in_every_spelling(argument, wanted):
    assert parse(argument)[0].model.tie_embeddings is wanted


def test_text_of_a_setting_is_taken_as_it_is():
    prompt = "def f(x):\n    # --config.seed=3 [bold]\n"
    assert parse(f"--config.evaluation.prompt={prompt}")[0].evaluation.prompt == prompt
    assert parse("--config.evaluation.prompt=")[0].evaluation.prompt == ""
    assert parse("--config.evaluation.prompt=None")[0].evaluation.prompt == "None"


def test_whole_number_is_a_float_where_one_is_wanted():
    assert parse("--config.optimizer.learning_rate=1")[0].optimizer.learning_rate == 1.0


@pytest.mark.parametrize("spelling", ["--config.{}=auto", "--config.{} auto"])
def test_auto_is_a_number_that_is_left_to_somebody_else(spelling):
    arguments = spelling.format("loss.balance.weight").split(" ")
    assert (
        parse("--config.loss.balance.weight=0.5", *arguments)[0].loss.balance.weight == config.AUTO
    )


def test_auto_is_refused_where_nobody_else_decides():
    sentence = refusal("--config.loss.z_weight=auto")
    assert sentence.startswith("config.loss.z_weight=auto must be of type float")
    assert "at least 0, or auto" in refusal("--config.loss.balance.weight=-2")


def test_settings_of_a_kind_are_given_with_its_choice():
    moe = parse("--config.model.moe.router=top_k", "--config.model.moe.top_k.k=3")[0].model.moe
    assert (moe.route.k, moe.top_p.threshold) == (3, 0.4)
    assert "has no effect while" in refusal("--config.model.moe.top_k.k=3")


def test_one_call_leaves_nothing_to_the_next():
    assert parse("--config.train.steps=7", "--workdir=a")[0].train.steps == 7
    cfg, workdir = parse("--config.seed=1")
    assert (cfg.train.steps, workdir) != (7, Path("a"))


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--config.model.num_layer=3", "did you mean config.model.num_layers?"),
        ("--config.modle.num_layers=3", "did you mean config.model.num_layers?"),
        ("--config.moe.top_p=0.3", "did you mean config.model.moe.top_p?"),
        ("--noconfig.model.tie_embedding", "did you mean config.model.tie_embeddings?"),
        ("--num_layers=3", "did you mean --config.model.num_layers?"),
        ("--workdi=x", "did you mean --workdir?"),
        ("--config=configs/quikstart.py", "did you mean --config=configs/quickstart.py?"),
        ("--config=nowhere/x.py", "did you mean --config=configs/quickstart.py?"),
        ("--config=pyproject.toml", "defines no get_config()"),
        ("--config", "did you mean --config=configs/quickstart.py?"),
        ("leftover", "'leftover' is not a flag"),
        ("--flagfile=nowhere", "Unable to open flagfile"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(argument, sentence):
    assert sentence in refusal(argument)


def test_outside_of_the_projects_folder_it_is_said_where_to_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refusal("--config.train.steps=7")
    assert "start the command in the project's folder" in said
    assert "did you mean" not in said


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--config.model.num_layers=many", "must be of type int"),
        ("--config.model.num_layers=3.0", "must be of type int"),
        ("--config.model.num_layers=", "must be of type int"),
        ("--config.model.num_layers", "must be of type int"),
        ("--noconfig.model.num_layers", "must be of type int"),
        ("--config.optimizer.learning_rate=fast", "must be of type float"),
        ("--config.optimizer.learning_rate=nan", "must be a finite number"),
        ("--config.model.tie_embeddings=maybe", "must be of type bool"),
        ("--config.train.steps=0", "must be at least 1 steps"),
        ("--config.model.moe.top_p.threshold=1.5", "must be at most 1"),
        ("--config.model.dtype=flot32", "did you mean 'float32'?"),
        ("--config.train.microbatches=5", "must divide config.train.batch_size"),
    ],
)
def test_value_that_cannot_be_is_refused(argument, sentence):
    assert sentence in refusal(argument)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("def get_config(:", "x.py:1 fails: SyntaxError"),
        (
            "def get_config():\n    return 1 / 0",
            "x.py:2 fails: ZeroDivisionError: division by zero",
        ),
        ("import nowhere\ndef get_config(): pass", "x.py:1 fails: ModuleNotFoundError"),
        (
            "def get_config():\n    return {}",
            "returns a dict; it must return config.to_config_dict",
        ),
        ("def get_config():\n    return None", "must return config.to_config_dict"),
        ("get_config = 3", "fails: TypeError"),
        (
            "from dynmoe_jax import config\ndef get_config():\n    return config.Config()",
            "returns a Config; it must return config.to_config_dict",
        ),
        (
            "from dynmoe_jax import config\ndef get_config():\n    return config.Train(steps=0)"
            "\nget_config = lambda: config.Config(train=config.Train(steps=0))",
            "config.train.steps=0 must be at least 1 steps",
        ),
    ],
)
def test_config_file_that_fails_is_named_with_its_line(tmp_path, body, sentence):
    (tmp_path / "x.py").write_text(body)
    assert sentence in refusal(f"--config={tmp_path}/x.py")


def test_every_setting_can_be_given_back_as_it_is():
    values = [(path, value) for path, _, value in config.walk(parse()[0])]
    arguments = [f"--config.{path}={value}" for path, value in values]
    assert parse(*arguments)[0] == parse()[0]


def test_help_lists_every_setting_and_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(console, "_width", 200)
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    assert command_line.run(lambda *_: pytest.fail("ran"), "What it is.") == 0
    printed = capsys.readouterr().out
    assert "What it is." in printed
    assert not [path for path, _, _ in config.walk(config.Config()) if path not in printed]


def test_message_with_markup_is_printed_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "[red]x[/red]"])
    assert command_line.run(lambda *_: pytest.fail("ran"), "") == 2
    assert "[red]x[/red]" in capsys.readouterr().out


def test_ctrl_c_before_the_loop_is_a_sentence_and_no_traceback(monkeypatch, capsys):
    def main(cfg, workdir):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert command_line.run(main, "") == command_line.EXIT_INTERRUPTED
    assert "the same command goes on" in capsys.readouterr().out


def test_program_refuses_before_it_writes(tmp_path):
    """As a user meets it: the flags read the process's own arguments too."""
    command = [sys.executable, ROOT / "train.py", f"--workdir={tmp_path}/run"]
    done = subprocess.run(
        [*command, "--config.model.num_layer=3"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == (
        "error: config.model.num_layer does not exist; did you mean config.model.num_layers?\n"
    )
    assert not done.stderr
    assert not list(tmp_path.iterdir())


def test_mistakes_are_found_without_starting_a_device():
    """Settings are made from what routers and losses declare, which needs JAX, but none of it."""
    program = (
        "import sys, jax; from dynmoe_jax import command_line, config; config.Config();"
        "sys.exit(bool(jax._src.xla_bridge._backends))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
