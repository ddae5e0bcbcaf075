"""Questions of the study, one file each."""

from dynmoe_jax.study.questions.ablations import Ablations
from dynmoe_jax.study.questions.cost import Cost
from dynmoe_jax.study.questions.hardness import Hardness
from dynmoe_jax.study.questions.other_rules import OtherRules
from dynmoe_jax.study.questions.over_training import OverTraining
from dynmoe_jax.study.questions.quality import Quality
from dynmoe_jax.study.questions.question import Question

QUESTIONS: dict[int, Question] = {
    1: Quality(),
    2: OverTraining(),
    3: Hardness(),
    4: OtherRules(),
    5: Cost(),
    6: Ablations(),
}
"""By number."""
