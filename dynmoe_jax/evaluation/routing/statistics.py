"""Statistics of routing, as functions of sums alone.

Axis legend: G groups of tokens, R bootstrap replicates, X classes of one variable, E experts, C
numbers of experts, S classes of surprise; * axes in front (layers, replicates).
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

CONFIDENCE = 0.95


def intervals(
    mean_G: Float[np.ndarray, "G"],
    replicate_GR: Float[np.ndarray, "G R"],
    documents_G: Int[np.ndarray, "G"],
) -> tuple[Float[np.ndarray, "G"], Float[np.ndarray, "G"]]:
    """(low, high) of the 95 % intervals around estimates.

    The standard error is that of the replicates, corrected for the number of documents and with
    Student's t in place of the normal, so that a handful of documents does not look like many.

    Args:
      mean_G: the estimates.
      replicate_GR: the same of resampled documents; NaN where none was drawn.
      documents_G: how many documents each is of; fewer than two give NaN.
    """
    known_GR = np.isfinite(replicate_GR)
    count_G = known_GR.sum(axis=-1)
    value_GR = np.where(known_GR, replicate_GR, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        center_G = value_GR.sum(axis=-1) / count_G
        square_GR = np.where(known_GR, value_GR - center_G[..., None], 0.0) ** 2
        error_G = np.sqrt(square_GR.sum(axis=-1) / (count_G - 1))
        error_G = error_G * np.sqrt(documents_G / (documents_G - 1))
    enough_G = documents_G >= 2
    t_G = stats.t.ppf((1 + CONFIDENCE) / 2, np.where(enough_G, documents_G - 1, 1))
    half_G = np.where(enough_G, t_G * error_G, np.nan)
    return mean_G - half_G, mean_G + half_G


def spearman(count_SC: Float[np.ndarray, "* S C"]) -> Float[np.ndarray, "*"]:
    """Spearman's rank correlation of two ordered variables, from the table of how often they meet.

    Ties have the mean of their ranks, as in :func:`scipy.stats.spearmanr`.  NaN where one of them
    does not vary.
    """
    rank_S = _mid_ranks(count_SC.sum(axis=-1))
    rank_C = _mid_ranks(count_SC.sum(axis=-2))
    total = count_SC.sum(axis=(-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        middle = (total + 1) / 2
        off_S, off_C = rank_S - middle[..., None], rank_C - middle[..., None]
        covariance = np.einsum("...sc,...s,...c->...", count_SC, off_S, off_C)
        square_S = np.sum(count_SC.sum(axis=-1) * off_S**2, axis=-1)
        square_C = np.sum(count_SC.sum(axis=-2) * off_C**2, axis=-1)
        scale = np.sqrt(square_S * square_C)
        return np.where(scale > 0, covariance / scale, np.nan)


def _mid_ranks(count_X: Float[np.ndarray, "* X"]) -> Float[np.ndarray, "* X"]:
    """The mean rank of what is in each class."""
    return np.cumsum(count_X, axis=-1) - count_X + (count_X + 1) / 2


def entropy(count_X: Int[np.ndarray, "X"]) -> float:
    """Entropy in bits of the distribution that counts describe; 0 where there are none."""
    total = count_X.sum()
    return float(stats.entropy(count_X / total, base=2)) if total else 0.0


def mutual_information(count_XE: Int[np.ndarray, "X E"]) -> float:
    """Mutual information in bits of two variables, from the table of how often they meet."""
    joint = entropy(count_XE.ravel())
    information = entropy(count_XE.sum(axis=1)) + entropy(count_XE.sum(axis=0)) - joint
    return max(information, 0.0)


def shuffled(count_XE: Int[np.ndarray, "X E"], seed: int = 0) -> Int[np.ndarray, "X E"]:
    """The table of the same variables, each as frequent as before, paired at random: the control.

    What it shows of dependence is what so few observations show of none.
    """
    rows, columns = count_XE.sum(axis=1), count_XE.sum(axis=0)
    if not count_XE.sum():
        return count_XE
    return stats.random_table(rows, columns).rvs(random_state=seed).astype(count_XE.dtype)


def largest_share(count_XE: Int[np.ndarray, "X E"], least: int = 1) -> float:
    """Mean over classes of the largest share of a class that one expert gets.

    Of token ids it is the context independence of OpenMoE (arXiv 2402.01739, section 4): 1 where
    the id decides.  NaN where no class is frequent enough.

    Args:
      count_XE: tokens of a class whose first choice an expert was.
      least: tokens that a class must have.
    """
    count_XE = count_XE[count_XE.sum(axis=1) >= max(1, least)]
    if not len(count_XE):
        return float("nan")
    return float(np.mean(count_XE.max(axis=1) / count_XE.sum(axis=1)))


def chance_agreement(first_E: Int[np.ndarray, "E"], second_E: Int[np.ndarray, "E"]) -> float:
    """How often two choices agree that have nothing in common but how often experts are chosen."""
    totals = first_E.sum() * second_E.sum()
    return float((first_E / first_E.sum()) @ (second_E / second_E.sum())) if totals else np.nan


def drop_rates(
    chosen_G: Int[np.ndarray, "G"], kept_G: Int[np.ndarray, "G"]
) -> Float[np.ndarray, "G"]:
    """Share of the choices that were dropped; NaN where nothing was chosen."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chosen_G > 0, 1 - kept_G / chosen_G, np.nan)


def joined(weight_G: Float[np.ndarray, "G"], parts: int) -> list[slice]:
    """Cuts neighboring groups into so many parts of about the same weight; none is empty."""
    total = weight_G.sum()
    if not total:
        return []
    cuts, begin, done = [], 0, 0.0
    for end in range(1, len(weight_G) + 1):
        part = weight_G[begin:end].sum()
        wanted = total * (len(cuts) + 1) / parts
        if part and (done + part >= wanted * (1 - 1e-9) or end == len(weight_G)):
            cuts.append(slice(begin, end))
            begin, done = end, done + part
    if cuts:
        cuts[-1] = slice(cuts[-1].start, len(weight_G))
    return cuts


def frequent(count_X: Int[np.ndarray, "X"], least: int) -> Bool[np.ndarray, "X"]:
    """Whether a class has enough tokens for its mean to say something."""
    return count_X >= max(1, least)
