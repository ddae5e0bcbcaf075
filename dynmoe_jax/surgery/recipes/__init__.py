"""Recipes: operations, trainings, evaluations and exports in a row, with one page over them."""

from dynmoe_jax.surgery.recipes.recipe import Comparison, Recipe
from dynmoe_jax.surgery.recipes.steps import (
    Efforts,
    Ensemble,
    Evaluate,
    Export,
    Operate,
    Sweep,
    Train,
)

# A recipe may choose any objective, and set it: importing the room registers them.
from dynmoe_jax.training import objectives  # noqa: F401

__all__ = [
    "Comparison",
    "Efforts",
    "Ensemble",
    "Evaluate",
    "Export",
    "Operate",
    "Recipe",
    "Sweep",
    "Train",
]
