"""Questions of the study, one file each."""

from dynmoe_jax.study.comparison.asked import Asked
from dynmoe_jax.study.questions.ablations import Ablations
from dynmoe_jax.study.questions.cost import Cost
from dynmoe_jax.study.questions.hardness import Hardness
from dynmoe_jax.study.questions.other_rules import OtherRules
from dynmoe_jax.study.questions.over_training import OverTraining
from dynmoe_jax.study.questions.quality import Quality
from dynmoe_jax.study.questions.question import Question

QUESTIONS: dict[int, Question] = {
    Asked.QUALITY: Quality(),
    Asked.EXPERTS_OVER_TRAINING: OverTraining(),
    Asked.HARDER_TOKENS: Hardness(),
    Asked.OTHER_RULES_AFTERWARDS: OtherRules(),
    Asked.COST: Cost(),
    Asked.ABLATIONS: Ablations(),
}
"""By number."""
