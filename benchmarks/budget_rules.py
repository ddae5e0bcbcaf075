"""Rules that hold a budget of experts per token, side by side.

    python -m benchmarks.budget_rules

Simulates routers whose logits drift and jump, without a model: each step draws fresh logits for the
tokens of layers that are unlike.  Prints, for each rule, by how much the mean over 20 steps misses
the budget at the most from step 200 on, and how many steps it takes after a jump to stay within 3%.

Axis legend: S steps, N layers, T tokens, E experts.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.command import run
from dynmoe_jax.routing import RouterInput, TopP

TARGET = 1.76
WINDOW = 20
SPREAD_N = np.array([0.6, 0.8, 1.2, 2.0])
"""Factors of the logits in layers that are unlike."""


@partial(jax.jit, static_argnames=("before", "after", "tokens", "experts"))
def simulate(scale_SN, before: TopP, after: TopP, changed, *, seed=0, tokens=256, experts=16):
    """(mean experts [S, N], thresholds [S]) of routers that are told after every step.

    Args:
      scale_SN: of the logits; of routers that normalize them, the factor that is learned.
      before: the router until a step.
      after: the router from then on, of the same state.
      changed: that step.
      seed: of the logits.
      tokens: T.
      experts: E.
    """
    layers = scale_SN.shape[1]
    state_N = jax.tree.map(lambda x: jnp.stack([x] * layers), before.initial_state(experts))
    params_N = {"router_DE": jnp.zeros((layers, 1, experts))}

    def step(state_N, inputs):
        number, scale_N = inputs
        key = jax.random.fold_in(jax.random.key(seed), number)
        logits_NTE = jax.random.normal(key, (layers, tokens, experts))

        def of_layer(logits_TE, scale, state):
            params = {"logit_scale": scale}
            if not before.normalize_logits:
                logits_TE = scale * logits_TE
            given = RouterInput(None, logits_TE, jnp.ones(tokens, bool), state, training=True)
            routing = before(params, given)
            return jnp.mean(routing.experts_per_token_T), before.measure(params, given, routing)

        means_N, seen_N = jax.vmap(of_layer)(logits_NTE, scale_N, state_N)
        if not state_N:
            return state_N, (means_N, jnp.float32(before.threshold))
        nexts = [router.next_state(params_N, state_N, seen_N)[0] for router in (before, after)]
        now = jax.tree.map(lambda a, b: jnp.where(number < changed, a, b), *nexts)
        return now, (means_N, state_N["threshold"][0])

    numbers_S = jnp.arange(scale_SN.shape[0])
    return jax.lax.scan(step, state_N, (numbers_S, scale_SN))[1]


def windows(means_SN) -> np.ndarray:
    """Means over layers and every 20 steps in a row; the first is of steps 0 to 19."""
    mean_S = np.mean(means_SN, axis=1)
    return np.convolve(mean_S, np.ones(WINDOW) / WINDOW, mode="valid")


def miss(means_SN, first: int, last: int | None = None, target: float = TARGET) -> float:
    """Largest relative error of a 20-step mean among the steps from one to another."""
    return float(np.max(np.abs(windows(means_SN[first:last]) / target - 1)))


def settled(means_SN, changed: int, target: float = TARGET) -> int:
    """Steps after a change from which on all 20-step means are within 3%."""
    wrong = np.abs(windows(means_SN[changed:]) / target - 1) > 0.03
    return int(np.max(np.flatnonzero(wrong), initial=-1)) + 1


def drift(steps=400):
    """Factors of logits that grow from 0.1 to 2.5."""
    return np.linspace(0.1, 2.5, steps)[:, None] * SPREAD_N


def jump(steps=400, at=200, factor=4.0):
    """Factors of logits that jump."""
    return np.where(np.arange(steps) < at, 1.0, factor)[:, None] * SPREAD_N


def main() -> None:
    """Prints the table."""
    cases = []
    for normalized in (False, True):
        logits = "normalized" if normalized else "raw"
        gains = [("quantile", (0.5, 0.5))]
        gains += [("proportional_integral", g) for g in ((0.1, 0.05), (0.5, 0.5), (1.0, 0.5))]
        for rule, (proportional, integral) in gains:
            router = TopP(
                experts_per_token=TARGET,
                budget_rule=rule,
                max_threshold=0.9,
                normalize_logits=normalized,
                proportional_gain=proportional,
                integral_gain=integral,
            )
            name = rule if rule == "quantile" else f"{rule} {proportional:g}, {integral:g}"
            cases.append((f"{logits}, {name}", router))
    columns = ["drift", "jump x4: before", "after 40", "settled", "budget 2.5: settled", "spread"]
    print("| logits, rule |", " | ".join(columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for name, router in cases:
        other = dataclasses.replace(router, experts_per_token=2.5)
        drifting, _ = simulate(drift(), router, router, 0)
        jumping, _ = simulate(jump(), router, router, 0)
        changing, _ = simulate(jump(factor=1.0), router, other, 200)
        spread = np.ptp(np.mean(jumping[180:200], axis=0))
        figures = [
            f"{miss(drifting, 200):.1%}",
            f"{miss(jumping, 100, 200):.1%}",
            f"{miss(jumping, 240):.1%}",
            f"{settled(jumping, 200)}",
            f"{settled(changing, 201, 2.5)}",
            f"{spread:.2f}",
        ]
        print(f"| {name} |", " | ".join(figures), "|")


if __name__ == "__main__":
    run(main)
