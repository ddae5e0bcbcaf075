"""Models that the study compares: each by the settings that tell it from MoE-Dynamic."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dynmoe_jax import config

Changes = Mapping[str, Any]
"""Values by dotted path, as ``--config.PATH=VALUE`` sets them."""

BUDGET = "model.moe.top_p.experts_per_token"


@dataclasses.dataclass(frozen=True)
class StudyModel:
    """One model of the comparison.

    Attributes:
      title: as people call it.
      changes: of the settings that all share.
      widened: whether it has the settings of the size's wider dense model besides.
      budget_of: name of the model whose mean experts per token, at the end of training from the
        same seed, it is held at; empty: of none.
      ablation: whether it is trained from one seed at half the steps, for question 6.
    """

    title: str
    changes: Changes = dataclasses.field(default_factory=dict)
    widened: bool = False
    budget_of: str = ""
    ablation: bool = False

    def settings(self, base: config.Config, wider: Changes) -> config.Config:
        """All settings of the model.

        Args:
          base: what all share: those of MoE-Dynamic.
          wider: settings of the wider dense model.
        """
        return changed(base, dict(self.changes) | dict(wider if self.widened else {}))


# Entropy is the dynamic model's loss; a fixed k has no use for it.
_NO_ENTROPY = {"loss.entropy.weight": 0.0}
_DENSE = {"model.moe.every_n_layers": 0}
_TOP_K = {"model.moe.router": "top_k"} | _NO_ENTROPY

MODELS: dict[str, StudyModel] = {
    "dense": StudyModel("dense", _DENSE),
    "wide_dense": StudyModel("wider dense", _DENSE, widened=True),
    "top_1": StudyModel("MoE-Top1", {**_TOP_K, "model.moe.top_k.k": 1}),
    "top_2": StudyModel(
        "MoE-Top2",
        {
            **_TOP_K,
            "model.moe.top_k.k": 2,
            # GShard (arXiv 2006.16668): the pair's weights sum to one, balance counts first
            # choices.
            "model.moe.top_k.renormalize": True,
            "loss.balance.counts": "first_choice_only",
        },
    ),
    "dynamic": StudyModel("MoE-Dynamic"),
    "dynamic_budget": StudyModel("MoE-Dynamic with a budget", budget_of="dynamic"),
    "dynamic_no_entropy": StudyModel("MoE-Dynamic without entropy loss", _NO_ENTROPY),
    "ablation_base": StudyModel("as in the comparison", ablation=True),
    "ablation_no_entropy": StudyModel("no entropy loss", _NO_ENTROPY, ablation=True),
    "ablation_paper_entropy": StudyModel(
        "entropy loss as light as the paper's", {"loss.entropy.weight": 1e-4}, ablation=True
    ),
    "ablation_renormalized": StudyModel(
        "renormalized gates", {"model.moe.top_p.renormalize": True}, ablation=True
    ),
    "ablation_per_choice": StudyModel(
        "balance per choice", {"loss.balance.counts": "per_choice"}, ablation=True
    ),
    "ablation_first_choice": StudyModel(
        "balance of first choices", {"loss.balance.counts": "first_choice_only"}, ablation=True
    ),
    "ablation_dense_first": StudyModel(
        "first layer dense", {"model.moe.dense_first_layers": 1}, ablation=True
    ),
}
"""By name, in the order in which they are trained."""


def changed(cfg: config.Config, changes: Changes) -> config.Config:
    """Settings with other values.

    Raises:
      ConfigError: a value cannot be, alone or beside the others.
    """
    settings = config.to_dict(cfg)
    for path, value in changes.items():
        *groups, name = path.split(".")
        inner = settings
        for group in groups:
            inner = inner[group]
        inner[name] = value
    return config.from_config_dict(settings)
