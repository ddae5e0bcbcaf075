"""Operations on models in memory, and small models to try them on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.edits.places import stored_in
from dynmoe_jax.edits.roles import Role
from dynmoe_jax.model import decoder_structure
from dynmoe_jax.surgery.operation import Given


def settings(**model):
    """Settings of a small dense model; others may be given."""
    small = {
        "num_layers": 2,
        "width": 16,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_width": 8,
        "hidden_width": 24,
        "vocab_size": 64,
        "max_seq_len": 32,
        "init_std": 0.3,
        "moe": {"every_n_layers": 0},
    }
    return config.from_config_dict({"model": small | model, "data": {"seq_len": 32}})


@functools.lru_cache(maxsize=16)
def drawn(cfg, seed=0):
    """Parameters of a model by place, drawn by numpy: nothing is compiled."""
    random, arrays = np.random.default_rng(seed), {}
    for stored, _ in stored_in(cfg.model):
        shape = stored.shape[stored.leading :]
        for place in stored.places():
            values = random.standard_normal(shape, np.float32) * np.float32(cfg.model.init_std)
            arrays[place] = np.ones_like(values) if place.array_name == "scale" else values
    return arrays


def made_by(operation, *parents, role=Role.PARAMETER, seed=0, statistic=None, findings=None):
    """(settings of the result, function that gives its array at a place); parents are pairs of
    settings and arrays by place, or by role and place."""
    cfg = operation.result([each for each, _ in parents])
    memo, findings = {}, {} if findings is None else findings

    def read(parent, place, role):
        found = parents[parent][1]
        return found.get(role, found)[place]

    def array(place, shape=()):
        models = tuple(each.model for each, _ in parents)
        given = Given(cfg.model, shape, role, seed, models, read, memo, statistic, findings)
        return operation.array(place, given)

    return cfg, array


def result_of(operation, *parents, **more):
    """(settings, arrays by place) of the result; for arguments see :func:`made_by`."""
    cfg, array = made_by(operation, *parents, **more)
    arrays = {}
    for stored, _ in stored_in(cfg.model):
        shape = stored.shape[stored.leading :]
        for place in stored.places():
            arrays[place] = array(place, shape)
            assert arrays[place].shape == shape
    return cfg, arrays


def logits(cfg, arrays):
    """Logits of a model of arrays by place, on some tokens."""
    tokens_BL = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (2, 16))
    leaves = []
    for stored, leaf in stored_in(cfg.model):
        whole = np.stack([arrays[place] for place in stored.places()]).reshape(stored.shape)
        leaves.append((stored.path, leaf.replace(jnp.asarray(whole))))
    compute = _computation(cfg.model)
    return np.asarray(compute(nnx.from_flat_state(leaves), jnp.asarray(tokens_BL)))


@functools.lru_cache(maxsize=8)
def _computation(model):
    structure = decoder_structure(model)
    return jax.jit(lambda params, ids: nnx.merge(structure, params)(ids).logits)
