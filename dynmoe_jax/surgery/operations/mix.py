"""Branch-Train-MiX: feed-forwards of several models become experts of one (arXiv 2403.07816)."""

import dataclasses
from typing import ClassVar

from dynmoe_jax.fields import ConfigError, free_setting
from dynmoe_jax.surgery.experts.new_experts import GatedExperts, dense_place
from dynmoe_jax.surgery.experts.routers import is_of_router, new_array
from dynmoe_jax.surgery.operation import OPERATIONS
from dynmoe_jax.surgery.operations.average import averaged, check_alike, weights_of

GATED = "gates"
"""Router of the result that the settings of gates choose."""


@OPERATIONS.register("mix")
@dataclasses.dataclass(frozen=True)
class Mix(GatedExperts):
    """Makes the feed-forward of each model an expert, and averages everything else.

    Of equal models it computes what they compute, whatever the new router says, as long as gates
    sum to one.
    """

    weights: str = free_setting(
        "", "weights of the models in what is averaged, such as 0.7,0.3; empty = equal"
    )
    router: str = free_setting(
        GATED,
        "router of the result: by the gates that top_k or top_p say; dense, all experts by their "
        "probabilities (soft routing); gumbel, sampled top-1",
        choices=(GATED, "dense", "gumbel"),
    )
    exact: ClassVar = "of equal models"
    paper: ClassVar = "Branch-Train-MiX, 2403.07816"
    parents: ClassVar = (2, None)

    def result(self, parents):
        """The first model's settings with as many experts as there are models."""
        check_alike(parents)
        weights_of(self.weights, len(parents))
        self.check_dense(parents[0].model)
        router = self.chosen_router()
        if self.router != GATED:
            if self.top_k or self.p:
                other = f"top_k={self.top_k}" if self.top_k else f"top_p={self.p:g}"
                raise ConfigError(
                    f"--router={self.router} --{other} name two routers; give one of them."
                )
            router = {"router": self.router}
        return self.with_experts(
            parents[0], len(parents), lambda units: {"hidden_width": units}, router
        )

    def array(self, place, given):
        """A model's feed-forward, a new router, or a mean."""
        if is_of_router(given.model, place):
            return new_array(place, given, self.router_std)
        if place.expert is None:
            return averaged(place, given, weights_of(self.weights, given.num_parents))
        return given.read(dense_place(place), place.expert)
