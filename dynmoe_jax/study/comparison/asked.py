"""Questions that a study may be asked, by number."""

import enum


class Asked(enum.IntEnum):
    """A question; its answers are in a file of :mod:`dynmoe_jax.study.questions`."""

    QUALITY = 1
    EXPERTS_OVER_TRAINING = 2
    HARDER_TOKENS = 3
    OTHER_RULES_AFTERWARDS = 4
    COST = 5
    ABLATIONS = 6

    @property
    def words(self) -> str:
        """Its number and name, for help texts."""
        return f"{self.value} {self.name.lower().replace(chr(95), chr(32))}"
