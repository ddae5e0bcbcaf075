"""Recipes: operations, trainings, evaluations and exports in a row, with one page over them."""

from dynmoe_jax.surgery.recipes.recipe import Comparison, Recipe
from dynmoe_jax.surgery.recipes.steps import Ensemble, Evaluate, Export, Operate, Train

__all__ = ["Comparison", "Ensemble", "Evaluate", "Export", "Operate", "Recipe", "Train"]
