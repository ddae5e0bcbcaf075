"""Kinds of steps; importing them registers them."""

from dynmoe_jax.surgery.recipes.steps.ensemble import Ensemble
from dynmoe_jax.surgery.recipes.steps.evaluate import Evaluate
from dynmoe_jax.surgery.recipes.steps.export import Export
from dynmoe_jax.surgery.recipes.steps.operate import Operate
from dynmoe_jax.surgery.recipes.steps.sweep import Efforts, Sweep
from dynmoe_jax.surgery.recipes.steps.train import Train

__all__ = ["Efforts", "Ensemble", "Evaluate", "Export", "Operate", "Sweep", "Train"]
