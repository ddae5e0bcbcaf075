"""Operations on models in memory, and small models to try them on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.edits.places import stored_in
from dynmoe_jax.edits.roles import Role
from dynmoe_jax.model import Decoder, decoder_structure
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
    """Parameters of a model as a new one begins with, by place."""
    state = nnx.state(Decoder(cfg.model, rngs=nnx.Rngs(seed)))
    leaves = dict(state.flat_state())
    return {
        place: np.asarray(leaves[stored.path].get_value())[stored.index(place)]
        for stored, _ in stored_in(cfg.model)
        for place in stored.places()
    }


def result_of(operation, *parents, role=Role.PARAMETER, seed=0, statistic=None, findings=None):
    """(settings, arrays by place) of the result; parents are such pairs, too, or have arrays by
    role and place."""
    cfg = operation.result([each for each, _ in parents])
    memo, arrays, findings = {}, {}, {} if findings is None else findings

    def read(parent, place, role):
        found = parents[parent][1]
        return found.get(role, found)[place]

    for stored, _ in stored_in(cfg.model):
        for place in stored.places():
            shape = stored.shape[stored.leading :]
            given = Given(
                cfg.model, shape, role, seed, len(parents), read, memo, statistic, findings
            )
            arrays[place] = operation.array(place, given)
            assert arrays[place].shape == shape
    return cfg, arrays


def logits(cfg, arrays):
    """Logits of a model of arrays by place, on some tokens."""
    tokens_BL = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (2, 16))
    leaves = []
    for stored, leaf in stored_in(cfg.model):
        whole = np.stack([arrays[place] for place in stored.places()]).reshape(stored.shape)
        leaves.append((stored.path, leaf.replace(jnp.asarray(whole))))
    structure, params = decoder_structure(cfg.model), nnx.from_flat_state(leaves)
    compute = jax.jit(lambda params, ids: nnx.merge(structure, params)(ids).logits)
    return np.asarray(compute(params, jnp.asarray(tokens_BL)))
