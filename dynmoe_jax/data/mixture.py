"""Examples-proportional mixtures of tasks, with a cap (T5, arXiv 1910.10683, section 3.5.2).

Instruction tuning mixes tasks of very different sizes (Flan-MoE, arXiv 2305.14705): each comes as
often as it has examples, but a task with more of them than the cap as if it had no more.
"""

from collections.abc import Mapping

from dynmoe_jax.data.errors import DataError

_NAME = "proportional"


def is_proportional(domain_weights: str) -> bool:
    """Whether ``config.data.domain_weights`` asks for a mixture in proportion to examples."""
    return domain_weights.strip().partition(":")[0].strip() == _NAME


def parse_cap(domain_weights: str) -> int | None:
    """The cap of ``"proportional:cap=3000"``; None of ``"proportional"``.

    Raises:
      DataError: something else stands behind the colon.
    """
    _, colon, asked = domain_weights.strip().partition(":")
    if not colon:
        return None
    name, _, number = (part.strip() for part in asked.partition("="))
    if name != "cap" or not number.isdecimal() or not int(number):
        raise DataError(
            f"config.data.domain_weights={domain_weights!r} must be {_NAME!r}, or '{_NAME}:cap=N' "
            "with the most examples that a domain counts with, a number of at least 1."
        )
    return int(number)


def proportional_counts(examples: Mapping[str, int], cap: int | None) -> dict[str, int]:
    """Examples that each domain counts with, min(n, cap); its rate is its share of their sum.

    Args:
      examples: training documents by domain.
      cap: None for none.
    """
    return {name: n if cap is None else min(n, cap) for name, n in examples.items()}
