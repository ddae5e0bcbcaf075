"""Choice of an implementation: the one a setting names, or the best that has no obstacle.

An *obstacle* says why an implementation cannot be used, in the words that follow its name in a
sentence: ``"needs a TPU, and this is a CPU"``; empty: it can be used.  One that ends in ``" or"``
brings a remedy of its own.
"""

from collections.abc import Callable, Iterable

from dynmoe_jax.fields import ConfigError
from dynmoe_jax.hardware.target import Target

AUTO = "auto"


def choose(
    setting: str, requested: str, candidates: Iterable[str], obstacle: Callable[[str], str]
) -> str:
    """Returns ``requested``, or for ``"auto"`` the first candidate without an obstacle.

    Args:
      setting: the dotted path of the setting, for messages.
      requested: its value.
      candidates: names, best first; the last must have no obstacle.
      obstacle: name -> what stands against it.

    Raises:
      ConfigError: what is requested has an obstacle.
    """
    if requested == AUTO:
        return next(name for name in candidates if not obstacle(name))
    check(setting, requested, obstacle(requested))
    return requested


def check(setting: str, requested: str, obstacle: str) -> None:
    """Raises ConfigError, in one sentence, if there is an obstacle to what is requested."""
    if obstacle:
        remedy = obstacle if obstacle.endswith(" or") else f"{obstacle};"
        raise ConfigError(f"{setting}={requested!r} {remedy} use {setting}={AUTO!r}.")


def platform_obstacle(platforms: tuple[str, ...], target: Target) -> str:
    """Obstacle that an implementation does not run on the target's platform.

    Args:
      platforms: where it runs; empty: anywhere.
      target: what the program will run on.
    """
    if not platforms or target.platform in platforms:
        return ""
    wanted = " or ".join(platform.upper() for platform in platforms)
    return f"needs a {wanted}, and this is a {target.platform.upper()}"


def not_installed(remedy: str) -> str:
    """Obstacle that a package is missing."""
    return f"is not installed here; {remedy} or"
