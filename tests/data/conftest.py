import random

import pytest

from dynmoe_jax import config
from dynmoe_jax.data import prepare, train_tokenizer
from tests.data.made_text import sentence, write_jsonl


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Three domains of made-up text as JSON Lines."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for domain, documents in (("alpha", 60), ("beta", 30), ("gamma", 3)):
        texts = [
            "".join(sentence(rng) for _ in range(rng.randint(1, 12))) for _ in range(documents)
        ]
        write_jsonl(folder / f"{domain}.jsonl", [{"text": text} for text in texts])
    return folder


@pytest.fixture(scope="session")
def settings(corpus):
    return config.Data(
        sources=f"jsonl:{corpus}/*.jsonl", seq_len=32, heldout_fraction=0.1, virtual_shards=4
    )


@pytest.fixture(scope="session")
def prepared(settings, tmp_path_factory):
    return prepare(settings, tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def tokenizer(prepared, tmp_path_factory):
    return train_tokenizer(
        prepared.sample_texts(1.0), 384, tmp_path_factory.mktemp("t") / "t.model"
    )
