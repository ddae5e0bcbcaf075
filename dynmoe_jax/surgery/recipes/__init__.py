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
