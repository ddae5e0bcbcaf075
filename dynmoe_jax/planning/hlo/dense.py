"""Finds products that would make a step pay for experts that nobody chose."""

from dynmoe_jax import config
from dynmoe_jax.planning.hlo.module import Module


def dense_over_experts(module: Module, model: config.Model, sizes: dict[str, int]) -> list[str]:
    """Names of products that compute every expert of a device for every row, in any branch.

    Such a product is no kernel, has an array with an axis of the device's experts and one of their
    hidden width, and costs more than the largest grouped product does at its static bound.
    """
    experts = model.moe.num_experts // sizes.get("expert", 1)
    hidden = model.moe.hidden_width // sizes.get("model", 1)
    products = module.products()
    most = max((p.flops for p in products if p.kind == "kernel"), default=0.0)

    def of_experts(shape) -> bool:
        return len(shape) > 2 and experts in shape and bool({hidden, 2 * hidden} & set(shape))

    return [
        p.name
        for p in products
        if p.kind != "kernel"
        and experts > 1
        and p.flops > 1.1 * most
        and any(of_experts(shape) for shape in (*p.operands, p.result))
    ]
