"""Published models: exact parameter counts and costs, by shape evaluation, nothing allocated.

The arithmetic is written out once more here, from the dimensions alone.
"""

import dataclasses
import importlib
from pathlib import Path

import pytest

from dynmoe_jax import config
from dynmoe_jax.model.parameters import active_parameters, count_parameters

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Published:
    """Dimensions of a model, and its parameters as published or worked out from them."""

    preset: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    experts: int
    k: int
    hidden: int
    total: float
    active: float
    shared: int = 0
    gate: bool = False
    bias: bool = False
    dense: int = 0  # layers without experts
    dense_hidden: int = 0
    tied: bool = False

    def outside(self) -> int:
        """Parameters outside of matrices, of routers and of gates: all that figures leave out."""
        moe = self.layers - self.dense
        norms = (2 * self.layers + 1) * self.width
        biases = self.bias * self.layers * (self.heads + 2 * self.kv_heads) * self.head
        return norms + biases + moe * self.width * (self.experts + self.gate)

    def embedding(self) -> int:
        return self.vocabulary * self.width

    def blocks(self, experts: int) -> int:
        """Matrices of all layers, with so many experts each."""
        heads = 2 * self.heads + 2 * self.kv_heads
        ffn = 3 * self.width
        moe = experts * ffn * self.hidden + ffn * self.shared
        dense = self.dense * ffn * self.dense_hidden
        return (
            self.layers * self.width * heads * self.head + dense + (self.layers - self.dense) * moe
        )

    def parameters(self, experts: int) -> int:
        return self.blocks(experts) + (1 if self.tied else 2) * self.embedding() + self.outside()


def openmoe(layers, width, heads, head, experts, hidden, **more):
    """A dense branch as wide as an expert, and dense layers as wide; tied embeddings."""
    same = {"shared": hidden, "dense_hidden": hidden, "tied": True, **more}
    return Published(
        "openmoe", layers, width, heads, heads, head, 256000, experts, 2, hidden, **same
    )


# Active parameters of OpenMoE are those of its blocks.
MODELS = {
    "mixtral_8x7b": Published(
        "mixtral", 32, 4096, 32, 8, 128, 32000, 8, 2, 14336, total=46.70, active=12.88
    ),
    "deepseek_moe_16b": dataclasses.replace(
        Published("deepseek_moe", 28, 2048, 16, 16, 128, 102400, 64, 6, 1408, 16.37, 2.82),
        shared=2816,
        dense=1,
        dense_hidden=10944,
    ),
    "qwen1_5_moe_a2_7b": dataclasses.replace(
        Published("qwen1_5_moe", 24, 2048, 16, 16, 128, 151936, 60, 4, 1408, 14.31, 2.69),
        shared=5632,
        gate=True,
        bias=True,
    ),
    "skywork_moe": Published(
        "skywork", 52, 4608, 36, 36, 128, 65536, 16, 2, 12288, total=146.4, active=22.7
    ),
    "openmoe_base": openmoe(12, 768, 12, 64, 16, 3072, dense=9, total=0.6496, active=0.156),
    "openmoe_8b": openmoe(24, 2048, 24, 128, 32, 8192, dense=20, total=8.78, active=2.21),
    "openmoe_34b": openmoe(32, 3072, 24, 128, 32, 12288, dense=24, total=34.6, active=6.64),
}

TOKENS = {
    "deepseek_moe_16b": 2e12,
    "openmoe_base": 128e9,
    "openmoe_8b": 1.1e12,
    "openmoe_34b": 200e9,
}
"""Of training, where published."""

DIMENSIONS = {
    *("num_experts", "hidden_width", "shared_hidden_width"),
    *("every_n_layers", "layer_offset", "dense_first_layers"),
}
"""Settings of ``moe`` that are a model's size and not its kind."""

each = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def load():
    """(name of a file) -> (its settings, its docstring), each read once."""
    found = {}

    def load(name):
        if name not in found:
            module = importlib.import_module(f"configs.published.{name}")
            found[name] = config.from_config_dict(module.get_config()), module.__doc__
        return found[name]

    return load


def digits(figure: float) -> int:
    """Decimal places that a figure is given with."""
    return len(str(figure).split(".")[1])


def test_every_file_is_tried():
    files = {path.stem for path in (ROOT / "configs" / "published").glob("*.py")}
    assert files == MODELS.keys() | {"shared"}


@each
def test_parameters(load, name):
    settings, about = load(name)
    model, published = settings.model, MODELS[name]
    total, active = count_parameters(model), active_parameters(model, published.k)
    assert total == published.parameters(published.experts)
    assert active == published.parameters(published.k)
    assert f"{total:,}" in about
    assert f"{active:,}" in about
    in_matrices = (total - published.outside()) / 1e9
    used = published.blocks(published.k) if published.tied else active - published.outside()
    assert round(in_matrices, digits(published.total)) == published.total
    assert round(used / 1e9, digits(published.active)) == published.active


@each
def test_router_and_losses_are_those_of_the_small_preset(load, name):
    settings, _ = load(name)
    preset = importlib.import_module(f"configs.routers.{MODELS[name].preset}")
    small = config.from_config_dict(preset.get_config())
    moe, of_small = vars(settings.model.moe), vars(small.model.moe)
    unlike = {key for key in moe if moe[key] != of_small[key]} - DIMENSIONS
    assert unlike == ({"top_k"} if name == "deepseek_moe_16b" else set())
    assert settings.model.moe.top_k.k == MODELS[name].k
    assert settings.model.attention_bias == small.model.attention_bias
    losses, of_small = vars(settings.loss), vars(small.loss)
    unlike = {key for key in losses if losses[key] != of_small[key]} - {"chunk_tokens"}
    assert unlike == ({"balance"} if name == "deepseek_moe_16b" else set())
    if name == "deepseek_moe_16b":
        # Seven experts and 1e-2 are the 2B model's.
        as_small = dataclasses.replace(settings.loss.balance, weight=small.loss.balance.weight)
        assert as_small == small.loss.balance
        assert settings.loss.balance.weight == 1e-3
        as_small = dataclasses.replace(settings.model.moe.top_k, k=small.model.moe.top_k.k)
        assert as_small == small.model.moe.top_k


@each
def test_training_and_its_cost(load, name):
    settings, about = load(name)
    published, length = MODELS[name], settings.data.seq_len
    tokens = settings.train.steps * settings.train.batch_size * length
    if name in TOKENS:
        assert TOKENS[name] <= tokens < 1.005 * TOKENS[name]
    else:
        # This project's choice: 20 for each active parameter.
        used = active_parameters(settings.model, published.k)
        assert abs(tokens / (20 * used) - 1) < 0.01
    moe = published.layers - published.dense
    scores = moe * published.width * (published.experts + published.gate)
    matrices = published.blocks(published.k) + published.embedding() + scores
    attention = published.layers * length * published.heads * published.head
    flops = 6 * tokens * (matrices + attention)
    assert f"{flops:.2e} FLOPs" in about
    assert f"about {float(f'{flops / (0.4 * 989e12 * 3600):.2g}'):,.0f} H100 hours" in about
    assert f"{16 * count_parameters(settings.model) / 1e9:,.1f} GB of state" in about
    text = f"{tokens / 1e9:.0f}B" if tokens < 1e12 else f"{tokens / 1e12:.2f}T"
    assert f"Cost: {text} tokens" in about
    assert f"--config=configs/published/{name}.py" in about


def test_what_openmoe_lacks_is_said(load):
    for name in MODELS:
        if name.startswith("openmoe"):
            assert all(word in load(name)[1] for word in ("Not here", "GEGLU", "UL2", "Adafactor"))
