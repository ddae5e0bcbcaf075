"""Price of a study that takes a cluster, by the planner."""

import jax

from dynmoe_jax.console import console, titled_table
from dynmoe_jax.planning.planner import Request as PlanRequest
from dynmoe_jax.planning.planner import plan_run
from dynmoe_jax.runs.formatting import duration
from dynmoe_jax.study.comparison.models import BUDGET, MODELS, changed
from dynmoe_jax.study.comparison.plan import Request, arms_of

PAPER_MEAN = 2.17
"""Experts per token of the paper's dynamic model, on average over training."""


def print_price(asked: Request) -> None:
    """Prints hours and chips of all runs, each by the planner's estimate of its step.

    Raises:
      ConfigError: the planner does not know the hardware.
    """
    # Nothing runs; and whatever accelerator is here stays free.
    jax.config.update("jax_platforms", "cpu")
    size, topology = asked.of_size, asked.of_size.ask
    table = titled_table(f"Estimate for {topology}, by the planner")
    for name in ("model", "runs", "hours each", "chip hours"):
        table.add_column(name, justify="left" if name == "model" else "right")
    total, chips = 0.0, 0
    arms = arms_of(asked)
    for name in dict.fromkeys(arm.model for arm in arms):
        model = MODELS[name]
        cfg = model.settings(asked.base, size.wider)
        if model.budget_of:
            cfg = changed(cfg, {BUDGET: PAPER_MEAN})
        steps = cfg.train.steps // 2 if model.ablation else cfg.train.steps
        fixed = cfg.model.moe.router == "top_k" or not cfg.model.moe_settings
        experts = None if fixed else PAPER_MEAN
        plan = plan_run(PlanRequest(cfg, topology, experts))
        chips = plan.chips
        count = sum(arm.model == name for arm in arms)
        seconds = steps * plan.time.step if plan.time else float("nan")
        total += count * seconds
        table.add_row(
            model.title,
            str(count),
            f"{seconds / 3600:,.1f}",
            f"{count * seconds / 3600 * chips:,.0f}",
        )
    console.print(table)
    console.print(
        f"{len(arms)} runs, one after another: {duration(total)} on {chips} chips "
        f"({total / 3600 * chips:,.0f} chip hours). Estimated by peak rates: real steps "
        "take longer."
    )
