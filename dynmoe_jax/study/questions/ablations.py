"""Question 6: ablations, from one seed at half the steps."""

from dynmoe_jax.evaluation.report.theme import light
from dynmoe_jax.runs.formatting import decimals
from dynmoe_jax.study.comparison.models import MODELS
from dynmoe_jax.study.questions.question import Answer, Question, Table, compared, in_words
from dynmoe_jax.study.questions.results import Results

BASE = "ablation_base"
_ONE = " One seed at half the steps: nothing is known of what another seed would give."


class Ablations(Question):
    """MoE-Dynamic with one thing changed."""

    models = ()
    title = "Which parts of it matter? (One seed at half the steps)"

    def answers(self, results):
        """Loss of each less that of the base; undecided, since one seed decides nothing."""
        if not results.have(BASE):
            return []
        return [_answer(results, name) for name in _names(results)]

    def tables(self, results):
        """Loss and experts of each."""
        if not results.have(BASE):
            return []
        rows = []
        for name in (BASE, *_names(results)):
            (result,) = results.of(name)
            used = (result.reached.mean, result.heldout["experts_per_token"])
            rows.append(
                [
                    MODELS[name].title,
                    in_words(results.loss(name)),
                    *(decimals(experts, 2) for experts in used),
                ]
            )
        header = ["ablation", "bits per byte", "experts, end of training", "experts, inference"]
        return [Table("One seed, half the steps; intervals over documents alone", header, rows)]

    def data(self, results):
        """Differences of loss."""
        if not results.have(BASE):
            return {}
        return {
            MODELS[name].title: results.loss_less(name, BASE).record() for name in _names(results)
        }

    def pictures(self, data, canvas):
        """Differences of loss with intervals over documents."""
        if not data:
            return []
        figure, (axis,) = canvas.figure(height=1.4 + 0.3 * len(data))
        for number, found in enumerate(data.values()):
            axis.plot([found["low"], found["high"]], [number] * 2, color=light("blue"), alpha=0.5)
            axis.plot([found["value"]], [number], "o", color=light("blue"), markersize=5)
        axis.axvline(0, color=light("ink"), linewidth=1)
        axis.set_yticks(range(len(data)), list(data))
        axis.invert_yaxis()
        axis.set(xlabel="bits per byte more than in the comparison")
        caption = "One seed at half the steps; bars are 95 % over documents, not over seeds."
        return [canvas.picture(figure, "What changes the loss", caption)]


def _names(results: Results) -> list[str]:
    names = [name for name, model in MODELS.items() if model.ablation and name != BASE]
    return [name for name in names if results.have(name)]


def _answer(results: Results, name: str) -> Answer:
    found, title = results.loss_less(name, BASE), MODELS[name].title
    words = (
        f"With {title} more bits per byte are needed, by {{}}",
        f"With {title} fewer bits per byte are needed, by {{}}",
    )
    return Answer(
        name,
        f"What does {title} change?",
        found,
        "bits per byte more",
        compared(found, *words) + _ONE,
    )
