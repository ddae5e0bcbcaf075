"""Rows of a routing within a row budget, as an MoE layer lays them out on one device."""

from dynmoe_jax.experts import Rows, rows_from_routing
from dynmoe_jax.experts.rows import rows_from_slots, slots_of
from dynmoe_jax.routing import Routing
from dynmoe_jax.routing.transforms.row_budget import RowBudget


def rows_within(routing: Routing, rows_per_token: float | None) -> Rows:
    """The rows that a budget leaves; all rows where it is None."""
    if rows_per_token is None:
        return rows_from_routing(routing)
    budget, (tokens, slots) = RowBudget(rows_per_token), routing.expert_TK.shape
    bound = budget.row_bound(tokens, tokens * slots, routing.num_experts)
    return rows_from_slots(slots_of(budget(routing, None)), bound)
