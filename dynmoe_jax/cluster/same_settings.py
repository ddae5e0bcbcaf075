"""Whether all processes of a run were started with the same settings."""

from dynmoe_jax import config
from dynmoe_jax.cluster import agreement


def check_same_settings(cfg: config.Config) -> None:
    """Refuses settings that are not those of process 0: the processes would wait for each other.

    Raises:
      ConfigError: a setting differs.
    """
    of_first = config.from_stored(agreement.broadcast(config.to_dict(cfg)))
    settings = zip(config.walk(cfg), config.walk(of_first), strict=True)
    for (path, _, value), (_, _, wanted) in settings:
        if value != wanted:
            raise config.ConfigError(
                f"config.{path}={value!r} is {wanted!r} in process 0; start all processes with the "
                "same settings."
            )
