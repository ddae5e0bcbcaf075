"""Measures of trained runs, one file each.

A measure says which models it is of, and makes a record of a run, which questions read.
"""

from dynmoe_jax.study.measures import hardness, heldout, items, other_rules
from dynmoe_jax.study.measures.measure import Measure

MEASURES: dict[str, Measure] = {
    "heldout": heldout.HeldOutText(),
    "hardness": hardness.Hardness(),
    "other_rules": other_rules.OtherRules(),
    "items": items.Items(),
}
"""By name, in the order in which they are taken."""
