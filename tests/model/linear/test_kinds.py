"""Every kind of matrix, registered or a toy: as the dense matrices that it stands for or as plain
numpy, and sharded as it is on one device; LoRA trains alone."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.mesh.axes import axes_of
from dynmoe_jax.mesh.make_mesh import batch_sharding, make_mesh, state_shardings
from dynmoe_jax.model import Decoder, decoder_structure, parameter_shapes
from dynmoe_jax.model.components import drawn as make
from dynmoe_jax.model.flops import forward_flops
from dynmoe_jax.model.linear import LinearKind
from dynmoe_jax.model.linear.kind import input_axes, matrix_names
from dynmoe_jax.model.linear.two_layer import net_names
from dynmoe_jax.registry import LINEARS, chosen
from dynmoe_jax.routing import Parameter
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import init_state, make_train_step

B, L, V = 4, 8, 32


@dataclasses.dataclass(frozen=True)
class Factored(LinearKind):
    """Two narrow matrices in place of one, multiplied one after the other."""

    def parameters(self, name, shape):
        stem, ends, inputs = *self.split(name), input_axes(name)
        return {
            f"{stem}_in_{ends[0]}R": Parameter((*shape[:inputs], 3)),
            f"{stem}_out_R{ends[1]}": Parameter((3, *shape[inputs:])),
        }

    @staticmethod
    def split(name):
        inputs = input_axes(name)
        axes = axes_of(name)
        return name.rsplit("_", 1)[0], ("".join(axes[:inputs]), "".join(axes[inputs:]))

    def factors(self, name, arrays):
        stem, (inputs, outputs) = self.split(name)
        return arrays[f"{stem}_in_{inputs}R"], arrays[f"{stem}_out_R{outputs}"]

    def dense(self, name, arrays):
        return jnp.tensordot(*self.factors(name, arrays), 1)

    def apply(self, name, arrays, x_XI):
        narrow, wide = self.factors(name, arrays)
        return x_XI @ narrow.reshape(-1, 3) @ wide.reshape(3, -1)


@pytest.fixture(scope="module", autouse=True)
def toy():
    with LINEARS.temporarily("factored", Factored):
        yield


KINDS = ["lora", "factored"]
ALL_KINDS = [*KINDS, "two_layer"]


def model_of(linear="dense", num_layers=1, every_n_layers=0):
    return config.Model(
        num_layers=num_layers,
        width=16,
        num_heads=4,
        num_kv_heads=2,
        head_width=4,
        hidden_width=24,
        vocab_size=V,
        max_seq_len=L,
        init_std=0.3,
        dtype="float32",
        linear=linear,
        moe=config.MoE(num_experts=4, hidden_width=8, every_n_layers=every_n_layers),
        **({"lora": {"rank": 3, "targets": "."}} if linear == "lora" else {}),
    )


def tokens_BL():
    return np.random.default_rng(0).integers(0, V, (B, L)).astype(np.int32)


def draw(model):
    """Parameters, none of which is zero."""
    random = np.random.default_rng(0)

    def draw_one(leaf):
        return jnp.asarray(random.normal(scale=0.3, size=leaf.shape), jnp.float32)

    return jax.tree.map(draw_one, parameter_shapes(model))


def loss_of(model):
    structure = decoder_structure(model)
    mix_BLV = np.random.default_rng(1).normal(size=(B, L, V)).astype(np.float32)

    def loss(params, tokens_BL):
        return jnp.sum(nnx.merge(structure, params)(tokens_BL).logits * mix_BLV)

    return jax.jit(jax.value_and_grad(loss))


def dense_of(model, params):
    """Parameters of a dense model that computes the same."""
    kind, found = chosen(model, "linear"), {}
    shapes = dict(parameter_shapes(model_of()).flat_state())
    given = dict(params.flat_state())
    for path, leaf in shapes.items():
        *where, name = path
        if name not in matrix_names():
            found[path] = given[path]
            continue
        names = kind.parameters(name, leaf.shape[1:])
        dense = jax.vmap(lambda arrays, name=name: kind.dense(name, arrays))
        found[path] = leaf.replace(dense({n: given[*where, n][...] for n in names}))
    return nnx.from_flat_state(list(found.items()))


@pytest.fixture(scope="module")
def on_one_device():
    """kind -> (value, gradients)."""
    return {kind: loss_of(model_of(kind))(draw(model_of(kind)), tokens_BL()) for kind in ALL_KINDS}


def assert_same(actual, wanted, rtol=1e-5):
    for (path, a), w in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(wanted), strict=True
    ):
        a, w = np.asarray(a, np.float64), np.asarray(w, np.float64)
        assert np.linalg.norm(a - w) <= rtol * np.linalg.norm(w), path


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_computes_what_its_dense_matrices_do(kind, on_one_device):
    model = model_of(kind)
    params = draw(model)
    dense, to_params = jax.vjp(lambda params: dense_of(model, params), params)
    value, gradients = loss_of(model_of())(dense, tokens_BL())
    assert_same(on_one_device[kind], (value, *to_params(gradients)))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_eight_devices_compute_what_one_does(kind, on_one_device):
    model, mesh = model_of(kind), make_mesh(config.Mesh(data=2, expert=2, model=2), B)
    params = draw(model)
    params = jax.device_put(params, state_shardings(params, mesh))
    with jax.set_mesh(mesh):
        tokens = jax.device_put(tokens_BL(), batch_sharding(mesh))
        assert_same(loss_of(model)(params, tokens), on_one_device[kind])


def drawn(model):
    @jax.jit
    def draw(key):
        return nnx.state(Decoder(model, rngs=nnx.Rngs(params=key)))

    return {path: leaf[...] for path, leaf in draw(jax.random.key(3)).flat_state()}


def test_the_same_seed_draws_the_same_matrices_with_lora():
    # A layer with experts behind one without: whatever is drawn behind a dense feed-forward.
    dense, lora = (drawn(model_of(kind, 4, 2)) for kind in ("dense", "lora"))
    for path, array in dense.items():
        np.testing.assert_array_equal(array, lora[path])
    added = {path: array for path, array in lora.items() if path not in dense}
    assert len(added) == 2 * (4 + 4 + 2)
    assert all(("lora_R" in path[-1]) == (not np.any(array)) for path, array in added.items())
    layers = [layer for array in added.values() if np.any(array) for layer in array]
    assert len({str(layer.ravel()[:4].tolist()) for layer in layers}) == len(layers)


def test_lora_begins_as_the_dense_matrices():
    kind = chosen(model_of("lora"), "linear")
    for name, shape in {"query_DHW": (16, 4, 4), "output_HWD": (4, 4, 16)}.items():
        keys = nnx.Rngs(params=jax.random.key(3))
        declared = kind.parameters(name, shape).items()
        arrays = {each: make(keys, parameter, 0.3)[...] for each, parameter in declared}
        np.testing.assert_array_equal(kind.dense(name, arrays), arrays[name])
        changed = {each: array + 0.1 for each, array in arrays.items()}
        assert not np.allclose(kind.dense(name, changed), changed[name])


def test_a_net_of_two_layers_computes_what_numpy_does():
    kind, random = chosen(model_of("two_layer"), "linear"), np.random.default_rng(0)
    for name, shape in {"query_DHW": (16, 4, 4), "output_HWD": (4, 4, 16)}.items():
        declared = kind.parameters(name, shape).items()
        # As many parameters as a matrix and a bias of 16 numbers each, 33 for every unit.
        assert sum(math.prod(each.shape) for _, each in declared) == 8 * 33 + 16
        assert kind.flops(name, shape) == 2 * 8 * 32
        arrays = {each: random.normal(size=parameter.shape) for each, parameter in declared}
        first, first_bias, last, last_bias = (arrays[each] for each in net_names(name))
        x_XI = random.normal(size=(3, 16))
        hidden_XU = np.maximum(x_XI @ first.reshape(16, 8) + first_bias, 0)
        wanted_XO = hidden_XU @ last.reshape(8, 16) + last_bias.reshape(16)
        np.testing.assert_allclose(kind.apply(name, arrays, x_XI), wanted_XO, rtol=1e-5, atol=1e-5)
    assert set(kind.parameters("down_FD", (24, 16))) == {"down_FD"}


def test_flops_of_a_model_follow_those_of_its_projections():
    dense, nets = model_of(), model_of("two_layer")
    halved = dataclasses.replace(nets, two_layer=dataclasses.replace(nets.two_layer, factor=0.5))
    plain, whole, half = (forward_flops(model, 1, L, 0) for model in (dense, nets, halved))
    # Queries and outputs are 16 x 16, keys and values 16 x 8: 8 and 5.44 units; halved, 4 and 2.72.
    assert plain - whole == 2 * (2 * 256 + 2 * 128) - 2 * (2 * 8 * 32 + 2 * 5 * 24)
    assert plain - half == 2 * (2 * 256 + 2 * 128) - 2 * (2 * 4 * 32 + 2 * 3 * 24)


def test_lora_adds_matrices_where_its_targets_say():
    names = {path[-1] for path, _ in parameter_shapes(model_of("lora")).flat_state()}
    assert {"query_lora_DR", "query_lora_RHW", "output_lora_HWR", "output_lora_RD"} <= names
    assert {"gate_up_lora_DR", "gate_up_lora_R2F", "down_lora_FR", "down_lora_RD"} <= names
    few = dataclasses.replace(model_of("lora"), lora=config.Model().lora)
    names = {path[-1] for path, _ in parameter_shapes(few).flat_state()}
    assert {name for name in names if "lora" in name} == {
        "query_lora_DR", "query_lora_RHW", "value_lora_DR", "value_lora_RGW"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "message"),
    [("router", r"config.model.lora.targets='router' must find one of query_DHW"),
     ("(", r"config.model.lora.targets='\(' must be a regular expression")],
)  # fmt: skip
def test_targets_that_find_no_matrix_are_refused(targets, message):
    model = config.Model(linear="lora", lora={"targets": targets})
    with pytest.raises(ConfigError, match=message):
        config.Config(model=model)


def test_only_the_adapters_train():
    cfg = config.Config(
        model=model_of("lora"),
        data=config.Data(seq_len=L),
        train=config.Train(batch_size=B, steps=3, trainable="lora"),
        optimizer=config.Optimizer(learning_rate=0.1, warmup_steps=0, weight_decay=0.5),
    )
    schedule = make_schedule(cfg.optimizer, cfg.train.steps)
    optimizer = make_optimizer(cfg.optimizer, schedule)
    state = first = init_state(cfg, optimizer, jax.random.key(0))
    batch = {
        "tokens": tokens_BL(),
        "targets": tokens_BL()[::-1],
        "positions": np.zeros((B, L), int),
    }
    batch["segment_ids"] = np.ones((B, L), np.int32)
    batch["positions"] = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    step = jax.jit(make_train_step(cfg, optimizer, schedule))
    for _ in range(3):
        state, metrics = step(state, batch)
    assert math.isfinite(metrics["loss"])
    before, after = dict(first.params.flat_state()), dict(state.params.flat_state())
    for path, leaf in before.items():
        same = np.array_equal(leaf[...], after[path][...])
        assert same != ("lora" in path[-1]), path
    moments = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.optimizer)}
    moments = {path for path in moments if "groups" in path or "embedding" in path}
    assert moments
    assert all("lora" in path for path in moments)
