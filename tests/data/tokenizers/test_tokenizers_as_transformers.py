"""A table of tokenizer folders: ids, texts, BOS, EOS and size are those of ``AutoTokenizer``."""

import pytest

from dynmoe_jax.data import kept_tokenizer, open_tokenizer
from tests.data.tokenizers.as_transformers import differences, read_by_transformers
from tests.data.tokenizers.tokenizer_folders import write
from tests.data.tokenizers.tokenizer_table import TABLE

pytest.importorskip("transformers", minversion="5.24", reason="needs the extra test")


@pytest.mark.parametrize("name", TABLE)
def test_it_is_that_of_transformers_and_stays_it_in_a_run(name, tmp_path):
    folder = write(tmp_path / "folder", TABLE[name])
    ours, theirs = open_tokenizer(folder), read_by_transformers(folder)
    assert not differences(ours, theirs)
    kept = tmp_path / "run" / ours.name_in_run
    ours.save(kept)
    assert kept_tokenizer(tmp_path / "run").fingerprint == ours.fingerprint
    # As a run is fine-tuned, and as it is exported.
    assert open_tokenizer(kept).files == ours.files
    if {file.name for file in folder.iterdir()} != ours.files.keys():
        assert not differences(ours, read_by_transformers(kept))
