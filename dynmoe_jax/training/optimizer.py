"""AdamW with clipping, its moments, and the shapes of the learning rate."""

from collections.abc import Sequence

import jax
import optax
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.runs.saving.moments import ADAM, OPTAX_NAMES, Moments


def make_schedule(
    optimizer: config.Optimizer, steps: int, rewound: Sequence[int] = ()
) -> optax.Schedule:
    """Learning rate by step, counted from 0.

    The warm-up is cut short if it would take more than half of the run.

    Args:
      optimizer: its settings.
      steps: of the run.
      rewound: steps after which it begins again, warm-up included, as that of a run of the steps
        that are left: where the model grows.
    """
    if rewound:
        parts = [make_schedule(optimizer, steps - begin) for begin in (0, *rewound)]
        return optax.join_schedules(parts, list(rewound))
    peak, final = optimizer.learning_rate, optimizer.learning_rate * optimizer.final_fraction
    warmup, start = _warmup(optimizer, steps), decay_start(optimizer, steps)
    # The first step already learns: the ramp goes from peak/(warmup+1), not from 0.
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    if start is None:
        return optax.join_schedules([ramp, optax.constant_schedule(peak)], [warmup])
    if optimizer.schedule == "warmup_cosine":
        decay = optax.cosine_decay_schedule(peak, max(1, steps - warmup), optimizer.final_fraction)
        return optax.join_schedules([ramp, decay], [warmup])
    decay = optax.linear_schedule(peak, final, max(1, steps - start))
    flat = optax.constant_schedule(peak)
    return optax.join_schedules([ramp, flat, decay], [warmup, start])


def decay_start(optimizer: config.Optimizer, steps: int, rewound: Sequence[int] = ()) -> int | None:
    """Steps after which the learning rate of a run of so many steps falls; None if it never does.

    The step after still has the peak, every later one less.  Where it is rewound, the last time
    counts; arguments as for :func:`make_schedule`.
    """
    if rewound:
        start = decay_start(optimizer, steps - rewound[-1])
        return None if start is None else rewound[-1] + start
    warmup = _warmup(optimizer, steps)
    if optimizer.schedule == "constant":
        return None
    if optimizer.schedule == "warmup_cosine":
        return warmup
    return max(warmup, steps - round(steps * optimizer.decay_fraction))


def _warmup(optimizer: config.Optimizer, steps: int) -> int:
    return min(optimizer.warmup_steps, steps // 2)


def make_optimizer(
    optimizer: config.Optimizer, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW (arXiv 1711.05101) with decay on matrices only."""
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.adamw(
            schedule,
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            mask=is_matrix,
        ),
    )


def moments_of(state: optax.OptState) -> Moments:
    """The moments in the state of an optimizer of :func:`make_optimizer`, or their shapes."""
    adam = optax.tree_utils.tree_get(state, ADAM)
    return Moments(**{field: getattr(adam, name) for field, name in OPTAX_NAMES.items()})


def with_moments(state: optax.OptState, moments: Moments) -> optax.OptState:
    """The state of an optimizer with other moments; the learning rate stays where it is.

    Args:
      state: of an optimizer of :func:`make_optimizer`.
      moments: of some or all of its parameters; those of others stay as they are.
    """
    before = moments_of(state)
    merged = moments._replace(
        first=nnx.merge_state(before.first, moments.first),
        second=nnx.merge_state(before.second, moments.second),
    )
    return with_all_moments(state, merged)


def with_all_moments(state: optax.OptState, moments: Moments) -> optax.OptState:
    """The state of an optimizer with moments in place of all that it has."""
    adam = optax.tree_utils.tree_get(state, ADAM)
    named = {name: getattr(moments, field) for field, name in OPTAX_NAMES.items()}
    return optax.tree_utils.tree_set(state, **{ADAM: adam._replace(**named)})


def is_matrix(params):
    """True for every parameter but the scales of norms, biases, and those declared without decay.

    By name: they are stacked over layers, so their rank does not tell them from matrices.
    """

    def of(path, leaf):
        name = jax.tree_util.keystr(path)
        declared = not isinstance(leaf, nnx.Variable) or leaf.get_metadata().get("decay", True)
        decays = "scale" not in name and "bias" not in name and declared
        return jax.tree.map(lambda _: decays, leaf)

    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return jax.tree.map_with_path(of, params, is_leaf=is_variable)
