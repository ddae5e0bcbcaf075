"""Small instruction tasks, made on the spot: to see instruction tuning work without any file.

Each task has templates, of which some are held out: a model that was tuned meets them for the first
time when it is evaluated (Flan, arXiv 2109.01652).  Two tasks are left out of the mixture, for
fine-tuning on one's own.  The same name gives the same documents, everywhere.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dynmoe_jax.data.chat.conversation import ASSISTANT, Turns
from dynmoe_jax.data.sources import task_world as world

Slots = dict[str, str]
Example = tuple[Slots, str]
"""Words for a template, and the answer."""

_DRAWN, _DRAWN_UNSEEN = 2000, 150
_HELD_OUT_TEMPLATES = 2
_PARAGRAPHS, _SENTENCES = 3000, 8
FACTS = "facts"
PARTS = (FACTS, "mixture", "mixture_unseen", "target", "target_unseen")
"""Names: plain text with what tasks ask for; instructions of the mixture and of the tasks left out,
each by the templates that are trained and by those held out."""


class Task(NamedTuple):
    """A task.

    Attributes:
      name: the domain of its documents.
      templates: of instructions, with names of slots in braces; the last two are held out.
      examples: (draws, whether they are for evaluation) -> all of them.
      target: whether it is left out of the mixture.
    """

    name: str
    templates: tuple[str, ...]
    examples: Callable[[random.Random, bool], list[Example]]
    target: bool = False


def _facts(pairs: list[tuple[str, str]]) -> Callable:
    """Examples of facts, the same ones for evaluation: templates are new there."""
    return lambda draw, unseen: [({"x": word}, answer) for word, answer in pairs]


def _drawn(answer: Callable[[list[str]], str], words: int) -> Callable:
    """Examples of lists of words, others for evaluation."""

    def examples(draw: random.Random, unseen: bool) -> list[Example]:
        lists = [
            draw.sample(world.NOUNS, words) for _ in range(_DRAWN_UNSEEN if unseen else _DRAWN)
        ]
        return [({"x": ", ".join(each)}, answer(each)) for each in lists]

    return examples


_BOTH_WAYS = [pair for one in world.OPPOSITES for pair in (one, one[::-1])]
_KINDS = [(noun, kind) for kind, nouns in world.KINDS.items() for noun in nouns]

TASKS = (
    Task(
        "opposite",
        ("What is the opposite of {x}?", "Give the opposite of {x}.", "{x}: name the opposite.",
         "Say the word that is the opposite of {x}.", "opposite of {x} =", "What is not {x}?",
         "Tell me the opposite of the word {x}.", "Which word is the opposite of {x}?"),
        _facts(_BOTH_WAYS),
    ),
    Task(
        "color",
        ("What is the color of {x}?", "Which color has {x}?", "{x}: name the color.",
         "Name the color of {x}.", "color of {x} =", "Say which color {x} has.",
         "Tell me the color of {x}.", "What color has {x}?"),
        _facts(world.COLORS),
    ),
    Task(
        "kind",
        ("Is {x} an animal, a food, a tool or a garment?", "What kind of thing is {x}?",
         "{x}: name the kind.", "Animal, food, tool or garment? {x}", "kind of {x} =",
         "Say which kind of thing {x} is.", "Tell me the kind of {x}.",
         "Which kind of thing is {x}?"),
        _facts(_KINDS),
    ),
    Task(
        "young",
        ("What is a young {x}?", "Name the young of the {x}.", "{x}: name the young.",
         "How is a young {x} called?", "young of {x} =", "Say what a young {x} is.",
         "Tell me the young of {x}.", "What is the young of {x}?"),
        _facts(world.YOUNG),
    ),
    Task(
        "next",
        ("What comes after {x}?", "Which number comes after {x}?", "{x}: name the next number.",
         "Count on from {x}.", "after {x} =", "Say the number after {x}.",
         "Tell me the next number after {x}.", "Which is the number after {x}?"),
        _facts(world.NEXT),
    ),
    Task(
        "first",
        ("Which word comes first: {x}?", "Give the first word of {x}.", "{x}: name the first word.",
         "Repeat the first of these words: {x}.", "first of {x} =", "Say the first of {x}.",
         "Tell me the first word of {x}.", "What is the first of {x}?"),
        _drawn(lambda words: words[0], 3),
    ),
    Task(
        "sound",
        ("What does the {x} do?", "Name the sound of the {x}.", "{x}: name the sound.",
         "Which sound does the {x} make?", "sound of {x} =", "Say how the {x} sounds.",
         "Tell me the sound of {x}.", "What is the sound of {x}?"),
        _facts(world.SOUNDS),
        target=True,
    ),
    Task(
        "last",
        ("Which word comes last: {x}?", "Give the last word of {x}.", "{x}: name the last word.",
         "Repeat the last of these words: {x}.", "last of {x} =", "Say the last of {x}.",
         "Tell me the last word of {x}.", "What is the last of {x}?"),
        _drawn(lambda words: words[-1], 3),
        target=True,
    ),
)  # fmt: skip


def conversations(part: str) -> Iterator[tuple[str, Turns]]:
    """Yields (task, turns) of a part of :data:`PARTS` that has instructions."""
    target, unseen = part.startswith("target"), part.endswith("unseen")
    for task in TASKS:
        if task.target != target:
            continue
        draw = random.Random(f"{task.name} {unseen}")
        seen, held_out = (
            task.templates[:-_HELD_OUT_TEMPLATES],
            task.templates[-_HELD_OUT_TEMPLATES:],
        )
        examples = task.examples(draw, unseen)
        # Facts come in every template, what is drawn in one each.
        if len(examples) > _DRAWN_UNSEEN - 1:
            templates = itertools.cycle(held_out if unseen else seen)
            pairs = list(zip(examples, templates, strict=False))
        else:
            pairs = list(itertools.product(examples, held_out if unseen else seen))
        for (slots, answer), template in pairs:
            yield task.name, [("user", template.format(**slots)), (ASSISTANT, answer)]


def paragraphs() -> Iterator[str]:
    """Yields plain text: every fact often, each time among others."""
    draw, facts = random.Random(FACTS), world.sentences()
    for _ in range(_PARAGRAPHS):
        yield " ".join(draw.sample(facts, _SENTENCES))
