"""The MoE layer in JAX: this project's backends, and the dense layer of equal active FLOPs.

Axis legend: T tokens, D model width, E experts, F hidden width.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.layer_cases import Arrays, Choice, Used
from dynmoe_jax import config
from dynmoe_jax.experts import Backend, ExpertWeights, apply_experts, make_backend, swiglu
from dynmoe_jax.model.components import compute_dtype
from dynmoe_jax.routing import Router, TopK, TopP

METHODS = {
    "ours": {"backend": "grouped"},
    "ours_recompute": {"backend": "grouped", "saved_rows_per_token": 0.0},
    "jax_ragged_dot": {"grouped_product": "xla"},
    "jax_tokamax": {"grouped_product": "tokamax"},
    "jax_capacity": {"backend": "capacity", "capacity_factor": 1.25},
}
"""Settings of ``config.model.moe``."""


def backend_of(method: str, choice: Choice) -> Backend:
    """The expert compute of a method, for a run with that router."""
    router = {"router": "top_k", "top_k": {"k": choice.k}} if choice.k else {"router": "top_p"}
    return make_backend(config.MoE(**METHODS[method], **router))


def router_of(choice: Choice) -> Router:
    """The project's router for a choice; top-k renormalizes, as Mixtral does."""
    return TopK(choice.k, renormalize=True) if choice.k else TopP(choice.p)


def moe_layer(choice: Choice, backend: Backend):
    """(x_TD, (router_DE, weights)) -> y_TD."""

    def layer(x_TD, parameters):
        router_DE, weights = parameters
        logits_TE = choice.scale * (x_TD @ router_DE)
        routing = router_of(choice).on_logits(logits_TE, jnp.ones(x_TD.shape[0], bool))
        return apply_experts(x_TD, routing, weights, backend)[0]

    return layer


def dense_layer(x_TD, parameters):
    """SwiGLU; its hidden width is what the tokens' experts have together, on average."""
    gate_up_D2F, down_FD = parameters
    return swiglu(x_TD @ gate_up_D2F) @ down_FD


def on_device(arrays: Arrays, dtype: str) -> Arrays:
    """The same numbers as JAX arrays in the compute type that ``config.model.dtype`` would name."""
    compute = compute_dtype(config.Model(dtype=dtype))
    return Arrays(*(jnp.asarray(array, compute) for array in vars(arrays).values()))


def moe_parameters(arrays: Arrays):
    """(router_DE, all experts)."""
    return arrays.router_DE, ExpertWeights(arrays.gate_up_ED2F, arrays.down_EFD)


def dense_parameters(arrays: Arrays, hidden_width: int):
    """(gate_up_D2F, down_FD) of a dense layer."""
    width = arrays.x_TD.shape[1]
    gate_up_key, down_key = jax.random.split(jax.random.key(0))
    dtype = arrays.x_TD.dtype
    gate_up_D2F = jax.random.normal(gate_up_key, (width, 2 * hidden_width), dtype) / width**0.5
    down_FD = jax.random.normal(down_key, (hidden_width, width), dtype) / hidden_width**0.5
    return gate_up_D2F, down_FD


def used_by(arrays: Arrays, choice: Choice) -> Used:
    """What a choice uses: useful FLOPs are counted from its rows."""
    logits_TE = choice.scale * (arrays.x_TD @ arrays.router_DE)
    routing = router_of(choice).on_logits(logits_TE, jnp.ones(logits_TE.shape[0], bool))
    return Used(int(jnp.sum(routing.load_E)), int(jnp.sum(routing.load_E > 0)))


class Compiled:
    """One layer in one direction, compiled; a case for timing.

    Attributes:
      compile_s: seconds to compile.
      temp_bytes: what it needs beyond its arguments and results, or None where unknown.
    """

    def __init__(self, layer, parameters, arrays: Arrays, backward: bool):
        self.arguments = (arrays.x_TD, parameters)
        if backward:
            self.arguments += (arrays.dy_TD,)
        run = partial(_gradients, layer) if backward else layer
        begin = time.perf_counter()
        self.run = jax.jit(run).lower(*self.arguments).compile()
        self.compile_s = time.perf_counter() - begin
        memory = self.run.memory_analysis()
        self.temp_bytes = memory.temp_size_in_bytes if memory else None

    def __call__(self) -> float:
        """Runs it once; seconds."""
        begin = time.perf_counter()
        results = jax.block_until_ready(self.run(*self.arguments))
        seconds = time.perf_counter() - begin
        del results
        return seconds


def _gradients(layer, x_TD, parameters, dy_TD):
    y_TD, pull = jax.vjp(layer, x_TD, parameters)
    return y_TD, pull(dy_TD)
