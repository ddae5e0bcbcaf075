"""Parents of other formats: folders in Hugging Face's, GGUF files, and runs imported from them."""

import random

import numpy as np
import pytest

from dynmoe_jax.interop.import_model import import_model
from dynmoe_jax.runs.load import load_run
from tests.interop.small_gguf import write_gguf
from tests.interop.test_import_export import write_hf
from tests.small_parent import arrays_of, main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Text that the tokenizers of small foreign models know."""
    folder, draw = tmp_path_factory.mktemp("letters"), random.Random(0)
    for number in range(8):
        (folder / f"{number}.txt").write_text("".join(draw.choices("abc", k=100)))
    return f"text:{folder}/*.txt"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    hf = write_hf(folder / "a folder é", "LlamaForCausalLM")
    return {"hf": hf, "gguf": write_gguf(folder / "small.gguf")}


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_they_are_upcycled_without_being_imported(foreign, letters, kind, tmp_path, capsys):
    parent, to = foreign[kind], tmp_path / "to"
    flags = (f"--from={parent}", f"--to={to}", "--num_experts=3")
    assert main("upcycle", *flags, "--plan") == 2
    assert "--data=SOURCES" in capsys.readouterr().out
    assert main("upcycle", *flags, f"--data={letters}", "--tokens=1") == 0
    import_model(parent, tmp_path / "imported")
    imported, found = arrays_of(tmp_path / "imported"), arrays_of(to)
    for path, values in imported.items():
        if path[-1] not in ("down_FD", "gate_up_D2F"):
            np.testing.assert_array_equal(found[path], values)
    down_NEFD = found["groups", "layers", 0, "feed_forward", "down_EFD"]
    down_NFD = imported["groups", "layers", 0, "feed_forward", "down_FD"]
    np.testing.assert_array_equal(down_NEFD, np.stack([down_NFD] * 3, axis=1))
    # The text came along, and is that of what is made of the result.
    assert load_run(to)[0].data.directory == ""
    assert main("stack", f"--from={to}", f"--to={tmp_path / 'stacked'}", "--plan") == 0


def test_an_imported_run_is_asked_for_text(foreign, tmp_path, capsys):
    import_model(foreign["gguf"], tmp_path / "run")
    assert main("stack", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'to'}", "--plan") == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "was trained elsewhere, on text that is not known here" in said
