"""The claim of "Harder Tasks Need More Experts" (arXiv 2403.07652), asked of small models.

    python -m benchmarks.paper_claim
    python -m benchmarks.paper_claim --data=python --steps=2000

Does the entropy loss lower the mean number of experts?  Does p = 0.7 use more than p = 0.3?  Do
positions whose next token is uncertain use more experts than those where it is certain, and does
the number of experts go with the model's own surprise?  On a made corpus of known entropy, or on
the bytes of a text; three seeds, one program for all models.
``tests/routing/test_paper_claim.py`` asks the same in short.  On the made corpus the larger p uses
more experts, an entropy loss of a hundred times the paper's weight fewer, the paper's own no fewer
than seeds differ by, and uncertain positions *fewer* than certain ones
(docs/measurements.md: paper-claim-made).  It goes with the balance loss:
without it no sign is certain, nor is there one on a mixture of sources.  On the bytes of real text
the first three hold too, and the correlation with surprise has no sign that seeds agree on
(docs/measurements.md: paper-claim-text).

Axis legend: A arms (settings times seeds), S steps, B batch, L positions, N MoE layers.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.command import run
from dynmoe_jax import config
from dynmoe_jax.data import prepare
from dynmoe_jax.model import decoder_structure
from dynmoe_jax.registry import CONTROLLERS, ROUTERS
from dynmoe_jax.routing import TopP
from dynmoe_jax.routing.controllers.controller import Controller, state_of
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import init_state, make_train_step

SEEDS = (0, 1, 2)
ALPHA = 1e-2
ARMS = {
    "beta 0": (0.4, 0.0),
    "paper": (0.4, 1e-4),
    "beta 1e-2": (0.4, 1e-2),
    "p 0.3": (0.3, 1e-4),
    "p 0.7": (0.7, 1e-4),
}
"""(p, beta) by name."""

STATES, BRANCHES = 32, 8
"""Tokens of the made corpora, and successors of those whose successor is uncertain."""

SOURCES, LEAST_PASSAGE = 4, 2
"""Sources of a mixture, and tokens that a passage of one has at the least behind its first."""


@dataclasses.dataclass(frozen=True)
class HeldTopP(TopP):
    """Top-p whose threshold is a state that nothing moves, so that models of many p are one
    program; K is that of the setting."""

    def initial_state(self, num_experts):
        """The setting."""
        return {"threshold": jnp.float32(self.threshold)}


@dataclasses.dataclass(frozen=True)
class Held(Controller):
    """A coefficient that is a state, likewise."""

    def initial(self, weight, layers):
        """The weight."""
        return state_of(coefficient=weight)

    def coefficient(self, weight, state, step):
        """The state."""
        return state["coefficient"]


@dataclasses.dataclass(frozen=True)
class Chain:
    """A Markov source: half of its states have one successor, half have several, equally likely.

    Attributes:
      next_VB: successors of each state; those of a certain one are all the same.
    """

    next_VB: np.ndarray
    vocabulary = STATES

    @classmethod
    def drawn(cls, seed: int) -> "Chain":
        """A source of a seed."""
        draw = np.random.default_rng(seed)
        only_V = draw.permutation(STATES)
        next_VB = np.repeat(only_V[:, None], BRANCHES, axis=1)
        for state in range(STATES // 2):
            next_VB[state] = draw.choice(STATES, BRANCHES, replace=False)
        return cls(next_VB)

    def uncertain(self, token_BL: np.ndarray) -> np.ndarray:
        """Whether the successor of tokens is uncertain: log(8) nats, otherwise 0."""
        return token_BL < STATES // 2

    def sequences(self, seed: int, count: int, length: int) -> np.ndarray:
        """[count, length] tokens."""
        draw = np.random.default_rng(seed)
        tokens = [draw.integers(0, STATES, count)]
        for _ in range(length - 1):
            tokens.append(self.next_VB[tokens[-1], draw.integers(0, BRANCHES, count)])
        return np.stack(tokens, axis=1)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture of sources, each of which is certain: what follows a token says the source.

    A separator begins a passage of a source that is drawn anew.  So the successor is uncertain
    behind a separator, and behind the first token of a passage, whichever it is: the same tokens
    are certain elsewhere.

    Attributes:
      next_SV: successor of each token in each source; no two sources agree on one.
    """

    next_SV: np.ndarray
    vocabulary = STATES + 1

    @classmethod
    def drawn(cls, seed: int) -> "Mixture":
        """Sources of a seed."""
        draw = np.random.default_rng(seed)
        place_V = draw.permutation(STATES)
        steps = draw.choice(np.arange(1, STATES), SOURCES, replace=False)
        # Each source goes around the same circle by a stride of its own.
        order = np.argsort(place_V)
        return cls(np.stack([place_V[(order + step) % STATES] for step in steps]))

    def uncertain(self, token_BL: np.ndarray) -> np.ndarray:
        """Whether it is a separator, or the first token of a passage."""
        separator_BL = token_BL == STATES
        first_BL = np.pad(separator_BL[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        return separator_BL | first_BL

    def sequences(self, seed: int, count: int, length: int) -> np.ndarray:
        """[count, length] tokens."""
        draw = np.random.default_rng(seed)
        token, source = draw.integers(0, STATES, count), draw.integers(0, SOURCES, count)
        tokens, age = [token], np.zeros(count, int)
        for _ in range(length - 1):
            ends = (age >= LEAST_PASSAGE) & (draw.random(count) < 1 / 6)
            begins = tokens[-1] == STATES
            source = np.where(begins, draw.integers(0, SOURCES, count), source)
            follows = self.next_SV[source, np.where(begins, 0, tokens[-1])]
            token = np.where(begins, draw.integers(0, STATES, count), follows)
            token = np.where(ends, STATES, token)
            age = np.where(ends | begins, 0, age + 1)
            tokens.append(token)
        return np.stack(tokens, axis=1)


def settings(vocabulary: int, length: int, batch: int, steps: int, **sizes) -> config.Config:
    """A small model with the paper's losses."""
    width = sizes.pop("width", 32)
    model = config.Model(
        num_layers=2,
        width=width,
        num_heads=2,
        num_kv_heads=2,
        head_width=width // 2,
        vocab_size=vocabulary,
        max_seq_len=length,
        init_std=sizes.pop("init_std", 0.1),
        kernels="plain",
        moe=config.MoE(
            router="held_top_p",
            num_experts=8,
            hidden_width=width // 2,
            backend="reference",
            held_top_p={"threshold": max(p for p, _ in ARMS.values())},
        ),
    )
    return dataclasses.replace(
        config.Config(),
        model=model,
        loss=config.Loss(balance={"weight": ALPHA}, entropy={"weight": 1e-4, "controller": "held"}),
        data=config.Data(seq_len=length),
        train=config.Train(batch_size=batch, steps=steps),
        optimizer=config.Optimizer(learning_rate=5e-3, warmup_steps=20),
    )


def batch_of(tokens_BL: jax.Array) -> dict[str, jax.Array]:
    """A batch of sequences that are one token longer than what the model reads."""
    shape = tokens_BL[:, :-1].shape
    return {
        "tokens": tokens_BL[:, :-1],
        "targets": tokens_BL[:, 1:],
        "segment_ids": jnp.ones(shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(shape[1]), shape),
    }


@dataclasses.dataclass(frozen=True)
class Trained:
    """Models of all arms and seeds after training, on held-out tokens.

    Attributes:
      arms: names of the arms; each has a model of every seed.
      mean_AS: mean experts per token in every step.
      experts_ABL: of held-out tokens, mean over layers.
      surprise_ABL: loss of the token that is predicted there, nats.
      tokens_ABL: the tokens themselves.
    """

    arms: tuple[str, ...]
    mean_AS: np.ndarray
    experts_ABL: np.ndarray
    surprise_ABL: np.ndarray
    tokens_ABL: np.ndarray

    def of(self, arm: str) -> "Trained":
        """The models of one arm, by seed."""
        start = self.arms.index(arm) * len(SEEDS)
        _, *arrays = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Trained((arm,), *(array[start : start + len(SEEDS)] for array in arrays))


def train(
    cfg_of: Any,
    data: np.ndarray,
    heldout: np.ndarray,
    arms: Collection[str] = tuple(ARMS),
    compiler_options: dict | None = None,
) -> Trained:
    """Trains a model for every arm and seed, all at once.

    Args:
      cfg_of: makes the settings, once the kinds that they name are there.
      data: [seeds, S, B, L + 1] tokens.
      heldout: [seeds, B, L + 1] tokens.
      arms: names of the arms.
      compiler_options: of XLA.
    """
    with ROUTERS.temporarily("held_top_p", HeldTopP), CONTROLLERS.temporarily("held", Held):
        cfg = cfg_of()
        schedule = make_schedule(cfg.optimizer, cfg.train.steps)
        optimizer = make_optimizer(cfg.optimizer, schedule)
        step = make_train_step(cfg, optimizer, schedule)
        structure = decoder_structure(cfg.model)

        def one(seed, p, beta, data_SBL, heldout_BL):
            state = init_state(cfg, optimizer, jax.random.key(seed))
            for path, leaf in state.params.flat_state():
                if path[-1] == "threshold":
                    leaf[...] = jnp.full_like(leaf[...], p)
            state.controllers["entropy"]["coefficient"] = beta

            def advance(state, tokens_BL):
                state, metrics = step(state, batch_of(tokens_BL))
                layers = metrics["load_NE"].shape[0]
                return state, jnp.sum(metrics["load_NE"]) / metrics["tokens"] / layers

            state, mean_S = jax.lax.scan(advance, state, data_SBL)
            batch = batch_of(heldout_BL)
            output = nnx.merge(structure, state.params)(batch["tokens"])
            log_p_BLV = jax.nn.log_softmax(output.logits)
            surprise_BL = -jnp.take_along_axis(log_p_BLV, batch["targets"][..., None], -1)[..., 0]
            experts_BL = jnp.mean(output.routing.experts_per_token.astype(jnp.float32), axis=0)
            return mean_S, experts_BL, surprise_BL

        models = [(seed, *ARMS[arm], i) for arm in arms for i, seed in enumerate(SEEDS)]
        # One after the other: over all arms at once, products of small batches compile slowly and
        # run slowly.  Data are arguments; as constants of the program they cost minutes.
        alone = jax.jit(one, compiler_options=compiler_options)
        each = [
            alone(seed, jnp.float32(p), jnp.float32(beta), data[place], heldout[place])
            for seed, p, beta, place in models
        ]
    found = jax.tree.map(lambda *x: np.stack(x), *each)
    places = [place for *_, place in models]
    return Trained(tuple(arms), *found, heldout[places, :, :-1])


def on_made(
    corpus: type, steps: int, batch: int = 8, length: int = 32, sizes: Any = None, **options
) -> tuple[Trained, np.ndarray]:
    """(models trained on a made corpus, whether held-out positions are uncertain).

    Args:
      corpus: :class:`Chain` or :class:`Mixture`.
      steps: of each model.
      batch: sequences of a step.
      length: of a sequence.
      sizes: of :func:`settings`, besides.
      options: of :func:`train`.
    """
    sources = [corpus.drawn(seed) for seed in SEEDS]
    shape = (steps, batch, length + 1)
    data = [c.sequences(100 + i, steps * batch, length + 1) for i, c in enumerate(sources)]
    data = np.stack([tokens.reshape(shape) for tokens in data])
    heldout = np.stack([c.sequences(200 + i, 32, length + 1) for i, c in enumerate(sources)])
    cfg_of = partial(settings, corpus.vocabulary, length, batch, steps, **(sizes or {}))
    trained = train(cfg_of, data, heldout, **options)
    uncertain = [sources[0].uncertain(token_BL) for token_BL in trained.tokens_ABL]
    return trained, np.stack(uncertain)


CORPORA = {"chain": Chain, "mixture": Mixture}


def correlation(x: np.ndarray, y: np.ndarray, rounds: int = 200) -> tuple[float, float, float]:
    """(correlation of two arrays [B, L], ends of its 95% interval by a bootstrap of sequences)."""
    draw = np.random.default_rng(0)

    def of(rows):
        a, b = x[rows].ravel(), y[rows].ravel()
        return np.corrcoef(a, b)[0, 1] if a.std() and b.std() else 0.0

    found = [of(draw.integers(0, len(x), len(x))) for _ in range(rounds)]
    return of(np.arange(len(x))), *np.quantile(found, [0.025, 0.975])


def interval(of_seeds: np.ndarray) -> str:
    """Mean over three seeds with the 95% interval of Student's t (4.303 for two degrees)."""
    half = 4.303 * np.std(of_seeds, ddof=1) / np.sqrt(len(of_seeds))
    return f"{np.mean(of_seeds):.3f} ± {half:.3f}"


def last_mean(trained: Trained, steps: int = 20) -> np.ndarray:
    """Mean experts per token of each model in the last steps."""
    return np.mean(trained.mean_AS[:, -steps:], axis=1)


def answers(trained: Trained, uncertain_ABL: np.ndarray | None) -> Iterator[str]:
    """Lines of the answers."""
    yield "| | experts per token, last 20 steps | held-out loss [nats] |\n|---|---|---|"
    for name in ARMS:
        arm = trained.of(name)
        yield (
            f"| {name} | {interval(last_mean(arm))} | "
            f"{interval(np.mean(arm.surprise_ABL, axis=(1, 2)))} |"
        )
    pairs = [("beta 0", "paper"), ("beta 0", "beta 1e-2"), ("p 0.7", "p 0.3")]
    for more, fewer in pairs:
        less = last_mean(trained.of(more)) - last_mean(trained.of(fewer))
        yield f"{more} less {fewer}: {interval(less)} experts"
    for name in ARMS:
        arm = trained.of(name)
        if uncertain_ABL is not None:
            masks = uncertain_ABL[: len(SEEDS)]
            gap = [e[m].mean() - e[~m].mean() for e, m in zip(arm.experts_ABL, masks, strict=True)]
            yield f"{name}: uncertain less certain positions {interval(np.array(gap))} experts"
        each = [correlation(e, s) for e, s in zip(arm.experts_ABL, arm.surprise_ABL, strict=True)]
        shown = ", ".join(f"{r:+.3f} ({a:+.3f} to {b:+.3f})" for r, a, b in each)
        yield f"{name}: correlation of experts with surprise {shown}"


def on_text(sources: str, steps: int, batch: int = 16, length: int = 64) -> Trained:
    """Models trained on the bytes of texts."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(config.Data(sources=sources, max_megabytes=8.0), Path(folder))
        text = "\n".join(prepared.sample_texts(8.0)).encode()
    bytes_ = np.frombuffer(text, np.uint8).astype(np.int32)
    rows = bytes_[: len(bytes_) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    order = np.random.default_rng(0).permutation(len(rows))
    heldout, rest = rows[order[:64]], rows[order[64:]]
    data = []
    for seed in SEEDS:
        chosen = np.random.default_rng(seed).integers(0, len(rest), steps * batch)
        data.append(rest[chosen].reshape(steps, batch, length + 1))
    cfg_of = partial(settings, 256, length, batch, steps, width=64)
    return train(cfg_of, np.stack(data), np.stack([heldout] * len(SEEDS)))


def main() -> None:
    """Prints the answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help="sources of text; empty: a made corpus")
    parser.add_argument("--corpus", choices=list(CORPORA), default="chain", help="the made one")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    if args.data:
        lines = answers(on_text(args.data, args.steps), None)
    else:
        lines = answers(*on_made(CORPORA[args.corpus], args.steps))
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    run(main)
