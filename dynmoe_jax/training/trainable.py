"""Parameters that are differentiated and have moments (``config.train.trainable``)."""

import re

from flax import nnx

from dynmoe_jax import config


def split_trainable(params: nnx.State, pattern: str) -> tuple[nnx.State, nnx.State]:
    """(trainable parameters, all other variables) of a model; :func:`nnx.merge_state` joins them.

    Args:
      params: all variables of a model.
      pattern: ``config.train.trainable``, which finds dotted names such as
        ``groups.layers.0.feed_forward.router_DE``; empty finds all.

    Raises:
      ConfigError: it is no regular expression, or finds no parameter.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise config.ConfigError(
            f"config.train.trainable={pattern!r} is no regular expression: {error}."
        ) from error

    def trains(path, variable):
        name = ".".join(map(str, path))
        return issubclass(variable.type, nnx.Param) and wanted.search(name) is not None

    trained, rest = nnx.split_state(params, trains, ...)
    if not trained:
        names = sorted({".".join(map(str, path)) for path, _ in params.flat_state()})
        raise config.ConfigError(
            f"config.train.trainable={pattern!r} finds no parameter; there are {', '.join(names)}."
        )
    return trained, rest
