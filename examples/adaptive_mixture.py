"""Vowels by an adaptive mixture of local experts, and by a network of the same size.

    python -m examples.adaptive_mixture [--picture=vowels.png]

Adaptive Mixtures of Local Experts (Jacobs, Jordan, Nowlan and Hinton, 1991) told four vowels apart
by their first two formants.  The recordings are not in here: formants are drawn around averages of
men, women and children as Peterson and Barney (1952) tabulate them, with a size of its own for
every speaker.  Four linear experts under a linear gate learn by the likelihood of the mixture, a
network with eight hidden units by cross entropy; both have 60 parameters, and both are descended
with the same steps over the whole training set.  Expect about 96% of unknown speakers' vowels right
by both, and experts that share the vowels out among them: the second table says who is responsible.
The paper's mixture also took fewer epochs than its network; on these made vowels, with one step
size for both, it takes more.

Axis legend: T utterances, E experts, C vowels, S seeds.
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dynmoe_jax.console import console, titled_table
from dynmoe_jax.routing.mixture import blended, mixture_loss, responsibilities

VOWELS = ("i", "ɪ", "ɑ", "ʌ")
FORMANTS = {
    "men": ((270, 2290), (390, 1990), (730, 1090), (640, 1190)),
    "women": ((310, 2790), (430, 2480), (850, 1220), (760, 1400)),
    "children": ((370, 3200), (530, 2730), (1030, 1370), (850, 1590)),
}
"""Averages of the first and second formant in Hz."""

SPEAKERS = {"men": 33, "women": 28, "children": 15}
TEST_SPEAKERS = 25
EXPERTS, HIDDEN = 4, 8
EPOCHS, STEP = 400, 0.5
TARGET = 0.9
"""Share of the training set that has to be right."""

Parameters = dict[str, Array]


def made_vowels(
    seed: int = 0,
) -> tuple[tuple[Float[np.ndarray, "T 2"], Int[np.ndarray, "T"]], ...]:
    """Two utterances of each vowel by every speaker: (formants, vowels) to learn and to test.

    Formants are logarithms, with mean 0 and standard deviation 1 over the training set.
    """
    random = np.random.default_rng(seed)
    speakers = []
    for group, count in SPEAKERS.items():
        for size in random.normal(0, 0.05, count):
            said = np.repeat(np.log(np.array(FORMANTS[group])), 2, axis=0)
            speakers.append(said + size + random.normal(0, (0.08, 0.05), said.shape))
    order = random.permutation(len(speakers))
    said = np.stack(speakers)[order].astype(np.float32)
    vowel = np.broadcast_to(np.repeat(np.arange(4), 2), said.shape[:2])
    train, test = said[TEST_SPEAKERS:].reshape(-1, 2), said[:TEST_SPEAKERS].reshape(-1, 2)
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    return (
        ((train - mean) / deviation, vowel[TEST_SPEAKERS:].reshape(-1)),
        ((test - mean) / deviation, vowel[:TEST_SPEAKERS].reshape(-1)),
    )


class Mixture:
    """Linear experts under a linear gate."""

    name = f"mixture of {EXPERTS} linear experts"

    @staticmethod
    def draw(key: Array) -> Parameters:
        """Draws parameters."""
        expert, gate = jax.random.split(key)
        return {
            "expert_E3C": 0.5 * jax.random.normal(expert, (EXPERTS, 3, 4)),
            "gate_3E": 0.5 * jax.random.normal(gate, (3, EXPERTS)),
        }

    @staticmethod
    def experts(params: Parameters, x_T2: Float[Array, "T 2"]):
        """(logits of the gate, log-probabilities of each expert's vowels)."""
        x_T3 = _with_bias(x_T2)
        log_TEC = jnp.einsum("ti,eic->tec", x_T3, params["expert_E3C"])
        return x_T3 @ params["gate_3E"], jax.nn.log_softmax(log_TEC, axis=-1)

    @classmethod
    def loss(cls, params, x_T2, vowel_T):
        """The mixture's negative log-likelihood."""
        logits_TE, log_TEC = cls.experts(params, x_T2)
        return jnp.mean(mixture_loss(logits_TE, _of_vowel(log_TEC, vowel_T)))

    @classmethod
    def probabilities(cls, params, x_T2):
        """Probabilities of the vowels."""
        logits_TE, log_TEC = cls.experts(params, x_T2)
        return blended(logits_TE, jnp.exp(log_TEC))


class Network:
    """One hidden layer."""

    name = f"network with {HIDDEN} hidden units"

    @staticmethod
    def draw(key: Array) -> Parameters:
        """Draws parameters."""
        hidden, out = jax.random.split(key)
        return {
            "hidden_3H": 0.5 * jax.random.normal(hidden, (3, HIDDEN)),
            "out_HC": 0.5 * jax.random.normal(out, (HIDDEN + 1, 4)),
        }

    @staticmethod
    def probabilities(params, x_T2):
        """Probabilities of the vowels."""
        hidden_TH = jnp.tanh(_with_bias(x_T2) @ params["hidden_3H"])
        return jax.nn.softmax(_with_bias(hidden_TH) @ params["out_HC"], axis=-1)

    @classmethod
    def loss(cls, params, x_T2, vowel_T):
        """Cross entropy."""
        probs_TC = cls.probabilities(params, x_T2)
        return -jnp.mean(jnp.log(jnp.take_along_axis(probs_TC, vowel_T[:, None], axis=1)))


def _with_bias(x_TD):
    return jnp.concatenate([x_TD, jnp.ones((x_TD.shape[0], 1))], axis=1)


def _of_vowel(log_TEC, vowel_T):
    """Log-probability that each expert gives to the vowel that was said."""
    return jnp.take_along_axis(log_TEC, vowel_T[:, None, None], axis=-1)[..., 0]


def descend(model, seeds: int, epochs: int = EPOCHS):
    """(parameters, share right of the training set by epoch [S, epochs], of the test set [S])."""
    (x_T2, vowel_T), (test_T2, test_T) = made_vowels()

    def right(params, x_T2, vowel_T):
        found_T = jnp.argmax(model.probabilities(params, x_T2), axis=-1)
        return jnp.mean(found_T == vowel_T)

    def epoch(params, _):
        share = right(params, x_T2, vowel_T)
        gradient = jax.grad(model.loss)(params, x_T2, vowel_T)
        return jax.tree.map(lambda p, g: p - STEP * g, params, gradient), share

    def run(seed):
        params, share_N = jax.lax.scan(epoch, model.draw(jax.random.key(seed)), length=epochs)
        return params, share_N, right(params, test_T2, test_T)

    return jax.jit(jax.vmap(run))(jnp.arange(seeds))


def epochs_to(share_SN: Float[np.ndarray, "S N"], target: float = TARGET) -> Int[np.ndarray, "S"]:
    """The first epoch at which each seed has reached the target; all epochs where none has."""
    reached_SN = np.asarray(share_SN) >= target
    return np.where(reached_SN.any(axis=1), reached_SN.argmax(axis=1), share_SN.shape[1])


def responsible(params: Parameters) -> Float[np.ndarray, "T E"]:
    """Posterior responsibilities of the experts for the training set."""
    (x_T2, vowel_T), _ = made_vowels()
    logits_TE, log_TEC = Mixture.experts(params, x_T2)
    return np.asarray(responsibilities(logits_TE, _of_vowel(log_TEC, vowel_T)))


def picture(params: Parameters, path: str) -> None:
    """Draws the vowels, and which expert is most responsible for each."""
    import matplotlib.pyplot as plt

    (x_T2, vowel_T), _ = made_vowels()
    owner_T = responsible(params).argmax(axis=1)
    figure, axis = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for vowel, marker in enumerate("o^sD"):
        mine = vowel_T == vowel
        axis.scatter(*x_T2[mine].T, c=owner_T[mine], marker=marker, s=18, cmap="tab10", vmin=0,
                     vmax=9, label=VOWELS[vowel])  # fmt: skip
    axis.set(xlabel="log first formant, standardized", ylabel="log second formant, standardized")
    axis.set_title("Vowel by marker, most responsible expert by color")
    axis.legend(title="vowel")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains both, and prints how many epochs each took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10, help="runs of each")
    parser.add_argument("--picture", default="", help="where to draw who is responsible for what")
    asked = parser.parse_args(arguments)
    table = titled_table(f"Epochs until {TARGET:.0%} of the training set are right")
    for column in ("", "parameters", "median epochs", "fewest", "most", "test set right"):
        table.add_column(column, justify="left" if not column else "right")
    for model in (Mixture, Network):
        params, share_SN, test_S = descend(model, asked.seeds)
        epochs_S = epochs_to(share_SN)
        size = sum(leaf[0].size for leaf in params.values())
        figures = (size, int(np.median(epochs_S)), epochs_S.min(), epochs_S.max())
        table.add_row(model.name, *map(str, figures), f"{np.mean(test_S):.1%}")
        if model is Mixture:
            best = int(np.argmin(epochs_S))
            best_params = jax.tree.map(lambda leaf, best=best: leaf[best], params)
    console.print(table)
    shares = titled_table("Mean responsibility of each expert for each vowel")
    for column in ("vowel", *(f"expert {i}" for i in range(EXPERTS))):
        shares.add_column(column, justify="right")
    (_, vowel_T), _ = made_vowels()
    for vowel, sign in enumerate(VOWELS):
        mean_E = responsible(best_params)[vowel_T == vowel].mean(axis=0)
        shares.add_row(sign, *(f"{share:.2f}" for share in mean_E))
    console.print(shares)
    if asked.picture:
        picture(best_params, asked.picture)


if __name__ == "__main__":
    main()
