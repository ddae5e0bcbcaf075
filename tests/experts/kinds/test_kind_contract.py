"""Every kind of expert, registered or a toy: as the oracle says, on one device and on eight."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.experts import ExpertWeights, apply_experts, make_backend, no_kernels
from dynmoe_jax.experts.parallel.transport import ring
from dynmoe_jax.experts.reference import reference_experts
from dynmoe_jax.experts.used_blocks import UsedBlocks
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.hardware.target import Target
from dynmoe_jax.mesh.make_mesh import check_divides, make_mesh
from dynmoe_jax.registry import EXPERTS
from dynmoe_jax.routing import TopP
from tests.experts.kinds.toy_kinds import TOYS

T, D, E, F = 80, 8, 4, 6
PADDING = 20
KINDS = {**EXPERTS, "biased": TOYS["biased"], "scaled": TOYS["scaled"]}


@pytest.fixture(scope="module", autouse=True)
def toys():
    with contextlib.ExitStack() as stack:
        for name, kind in TOYS.items():
            stack.enter_context(EXPERTS.temporarily(name, kind))
        yield


@pytest.fixture(scope="module")
def case():
    """x, logits: nobody chooses expert 1; the last tokens, all of one device, are padding: NaN."""
    x_TD, logits_TE = (jax.random.normal(jax.random.key(i), (T, n)) for i, n in enumerate((D, E)))
    return x_TD.at[-PADDING:].set(jnp.nan), logits_TE.at[:, 1].set(-50.0)


def draw(kind):
    arrays = {}
    for i, (name, parameter) in enumerate(kind.parameters(D, E, F).items()):
        key = jax.random.key(10 + i)
        arrays[name] = jax.random.normal(key, parameter.shape) / 2
    return arrays


def layer(backend, kind, x_TD, logits_TE, arrays, transport=None):
    """(y, gradients of x, logits, weights) of a loss of the layer's outputs."""

    def loss(x_TD, logits_TE, arrays):
        routing = TopP(0.6).on_logits(logits_TE, jnp.arange(T) < T - PADDING)
        weights = kind.dense(arrays) if kind.stored_dense else arrays
        y_TD, dropped = apply_experts(
            x_TD, routing, weights, backend, transport=transport, splits_hidden=kind.splits_hidden
        )
        return jnp.sum(jnp.sin(y_TD)), (y_TD, dropped)

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, (y_TD, dropped)), gradients = grad(x_TD, logits_TE, arrays)
    assert dropped == 0
    return y_TD, gradients


def assert_same(actual, wanted):
    for (path, a), w in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(wanted), strict=True
    ):
        a, w = np.asarray(a, np.float64), np.asarray(w, np.float64)
        assert np.linalg.norm(a - w) <= 1e-5 * np.linalg.norm(w), path


def by_name(weights):
    """Arrays by the names of their parameters."""
    if isinstance(weights, ExpertWeights):
        return {"gate_up_ED2F": weights.gate_up_ED2F, "down_EFD": weights.down_EFD}
    return weights


@pytest.fixture(scope="module")
def wanted(case):
    """name -> what the oracle says: every expert on every token."""

    @functools.cache
    def of(name):
        kind = KINDS[name]()

        def oracle(x_TD, rows, weights):
            return reference_experts(x_TD, rows, by_name(weights), kind)

        return layer(oracle, kind, *case, draw(kind))

    return of


@pytest.mark.parametrize("name", KINDS)
def test_names_say_the_axes_and_shapes_begin_with_experts(name):
    for parameter_name, parameter in KINDS[name]().parameters(D, E, F).items():
        sizes = {"E": E, "D": D, "F": F, "2F": 2 * F}
        axes = parameter_name.rsplit("_", 1)[1].replace("2F", "f")
        assert axes[0] == "E"
        assert parameter.shape == tuple(sizes["2F" if a == "f" else a] for a in axes)


@pytest.mark.parametrize("name", EXPERTS)
def test_flops_are_those_of_the_products(name):
    kind = KINDS[name]()
    matrices = (p.shape[1:] for p in kind.parameters(D, E, F).values() if len(p.shape) == 3)
    assert kind.flops_per_row(D, F) == sum(2 * math.prod(shape) for shape in matrices)


@pytest.mark.parametrize("name", KINDS)
def test_one_device_computes_what_the_oracle_does(name, case, wanted):
    kind, arrays = KINDS[name](), draw(KINDS[name]())
    y_TD, gradients = layer(make_backend(config.MoE(experts=name)), kind, *case, arrays)
    assert_same((y_TD, gradients), wanted(name))
    assert not np.any(y_TD[-PADDING:])
    for array in gradients[2].values():
        assert not np.any(array[1])


def test_the_loop_over_used_blocks_computes_what_kernels_do(case, wanted):
    kind = KINDS["swiglu"]()

    def backend(x_TD, rows, weights):
        return UsedBlocks(kind)(x_TD, rows, by_name(weights))

    assert_same(layer(backend, kind, *case, draw(kind)), wanted("swiglu"))


def test_rows_that_fill_a_block_up_have_no_part_in_a_gradient(case):
    kind, (x_TD, logits_TE) = TOYS["normed"](), case
    y_TD, gradients = layer(UsedBlocks(kind), kind, x_TD, logits_TE, draw(kind))
    assert np.all(np.isfinite(y_TD))
    assert all(np.all(np.isfinite(array)) for array in jax.tree.leaves(gradients))
    assert np.any(gradients[2]["turn_EDD"])


@pytest.mark.parametrize("backend", ["capacity", "reference"])
def test_other_backends_compute_any_kind(backend, case, wanted):
    kind = TOYS["biased"]()
    moe = config.MoE(experts="biased", backend=backend, capacity_factor=16.0)
    assert_same(layer(make_backend(moe), kind, *case, draw(kind)), wanted("biased"))


# Experts split, hidden units split, both; parameters in pieces along data.
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 2, "model": 2}])
def test_eight_devices_compute_what_one_does(name, sizes, case, wanted):
    kind, mesh = KINDS[name](), make_mesh(config.Mesh(**sizes), T)
    with jax.set_mesh(mesh):
        backend = make_backend(config.MoE(experts=name))
        assert_same(layer(backend, kind, *case, draw(kind), ring), wanted(name))


def test_a_kernel_beside_a_kind_that_it_does_not_know_is_refused():
    moe = config.MoE(experts="squared_relu", grouped_product="blocks")
    with pytest.raises(ConfigError, match=r"grouped_product='blocks'.*experts='squared_relu'"):
        make_backend(moe, Target("cpu"))
    make_backend(config.MoE(experts="scaled", grouped_product="blocks"), Target("cpu"))


def test_a_run_says_what_computes_a_kind_without_kernels():
    assert "squared_relu" in no_kernels(config.MoE(experts="squared_relu"))
    assert not no_kernels(config.MoE())
    assert not no_kernels(config.MoE(experts="scaled"))


def test_a_mesh_may_cut_the_experts_of_a_kind_that_is_never_split():
    sizes = {"expert": 1, "model": 4}
    model = config.Model(moe=config.MoE(experts="biased", hidden_width=6))
    check_divides(model, sizes)
    with pytest.raises(ConfigError, match="hidden_width=6"):
        check_divides(config.Model(moe=config.MoE(hidden_width=6)), sizes)
