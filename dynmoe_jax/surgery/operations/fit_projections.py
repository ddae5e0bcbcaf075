"""Nets of two layers in place of the projections of attention, fitted to what those compute.

D2DMoE (arXiv 2310.04361), step 2.

Axis legend: S sampled tokens, I inputs of a projection side by side, O its outputs side by side.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from dynmoe_jax.edits.places import Place
from dynmoe_jax.edits.roles import drawn
from dynmoe_jax.edits.settings import edited
from dynmoe_jax.fields import ConfigError, free_setting, same_setting
from dynmoe_jax.model.linear.kind import ATTENTION, input_axes
from dynmoe_jax.model.linear.two_layer import TwoLayer, net_names
from dynmoe_jax.registry import chosen
from dynmoe_jax.surgery.experts.fitted_routers import FittedRouters
from dynmoe_jax.surgery.experts.projection_fit import fit_net
from dynmoe_jax.surgery.operation import OPERATIONS, Given, Operation, Wanted

_INPUTS, _MIXED = "attention_input_samples", "attention_mixed_samples"


@OPERATIONS.register("fit_projections")
@dataclasses.dataclass(frozen=True)
class FitProjections(Operation):
    """Replaces projections of attention by nets of two layers.

    A net learns, by squared errors, what a projection makes of its inputs on training text.  At
    --factor=1 it has as many parameters and FLOPs as the projection; of fewer, it is cheaper.  A
    ReLU lies between its layers, so that few of its units may be on, which training with
    --config.train.objective=sparsify does for those of feed-forwards.
    """

    factor: float = same_setting(TwoLayer, "factor")
    targets: str = same_setting(TwoLayer, "targets")
    inputs: int = free_setting(
        8192, "tokens that are learned from, a quarter of them to measure on", unit="tokens", low=8
    )
    epochs: int = same_setting(FittedRouters, "epochs")
    batch_size: int = same_setting(FittedRouters, "batch_size")
    learning_rate: float = free_setting(3e-3, "of Adam, at first", above=0.0)
    paper: ClassVar = "D2DMoE, 2310.04361"
    statistics: ClassVar = frozenset({_INPUTS, _MIXED})
    found: ClassVar = (
        "Squared error of what stands for projections, of samples that nothing was learned from, "
        "as a share of their outputs' variance: the mean over the projections of a layer, beside "
        "that of the best linear maps through as many units; and that of each net."
    )

    def wanted(self, parents):
        """Inputs of the projections that are replaced."""
        (cfg,) = parents
        kind = self._kind(cfg)
        names = {statistic_of(name) for name in ATTENTION if kind.applies(name)}
        return Wanted(frozenset(names), samples=self.inputs)

    def result(self, parents):
        """The parent's settings with nets."""
        (cfg,) = parents
        kinds = sorted({layer.model.linear for layer in cfg.model.by_layer} - {"dense"})
        if kinds:
            raise ConfigError(
                f"--from names a model with config.model.linear={kinds[0]!r}; nets are fitted to "
                "plain matrices: name a model that has them."
            )
        names = (field.name for field in dataclasses.fields(TwoLayer))
        settings = {f"model.two_layer.{name}": getattr(self, name) for name in names}
        return edited(cfg, {"model.linear": "two_layer"} | settings)

    def _kind(self, cfg) -> TwoLayer:
        return chosen(self.result([cfg]).model, "linear")

    def remarks(self, parents):
        """Says what may be done about the errors."""
        return ["Nets compute projections nearly; training on makes up for what is lost."]

    def array(self, place, given):
        """A part of a fitted net, and everything else as it was."""
        if place.layer is None or not place.name.startswith("attention."):
            return given.read(place)
        kind = chosen(given.model, "linear")
        parts = {each for name in ATTENTION if kind.applies(name) for each in net_names(name)}
        if place.array_name not in parts:
            return given.read(place)
        arrays = given.once(
            ("projections", place.layer),
            lambda: self._fitted(kind, place.layer, given.parameters()),
        )
        return drawn(arrays[place.array_name].reshape(given.shape), given.role)

    def _fitted(self, kind: TwoLayer, layer: int, given: Given) -> dict[str, np.ndarray]:
        """Parts of the nets of a layer by name, with their errors among the findings."""
        arrays, nets, linear = {}, {}, []
        for name in filter(kind.applies, ATTENTION):
            matrix = given.read(Place(layer, f"attention.{name}"))
            inputs = int(np.prod(matrix.shape[: input_axes(name)]))
            fit = fit_net(
                matrix.reshape(inputs, -1),
                given.statistic(statistic_of(name), layer).reshape(-1, inputs),
                kind.units(name, matrix.shape),
                (self.epochs, self.batch_size, self.learning_rate),
                given.random(Place(layer, "attention"), name),
            )
            arrays |= zip(net_names(name), fit.net, strict=True)
            nets[name.rpartition("_")[0]] = fit.error
            linear.append(fit.linear_error)
        means = {"nets": np.mean(list(nets.values())), "linear maps": np.mean(linear)}
        given.findings[layer] = {each: float(value) for each, value in (means | nets).items()}
        return arrays


def statistic_of(name: str) -> str:
    """Name of the statistic that holds the inputs of a projection."""
    return _MIXED if input_axes(name) > 1 else _INPUTS
