"""The record of an analysis, ``routing.json``: what the sums of one pass say.

Axis letters: N MoE layers, E experts, V token ids, S classes of surprise, C numbers of experts, R
replicates.
"""

import math
from typing import Any

import numpy as np

from dynmoe_jax.evaluation.routing import statistics
from dynmoe_jax.evaluation.routing.gather import (
    POSITIONS,
    SURPRISE_EDGES,
    WORD_PLACES,
    RoutingSums,
    position_range,
)
from dynmoe_jax.evaluation.routing.sums import Interval
from dynmoe_jax.routing.statistics import existing_experts, load_imbalance, unused_experts

FILE_NAME = "routing.json"
SHOWN_TOKENS = 20
OFTEN = 20
"""Occurrences below which the mean of a token id says more about its places than about it."""

_SURPRISE_PARTS = 12


def to_record(sums: RoutingSums, looks_ahead: str | None = None) -> dict[str, Any]:
    """The record; numbers that nothing is known of are NaN.

    Args:
      sums: of the pass.
      looks_ahead: says so of a model whose routing depends on later tokens, which is no ground for
        words about surprise.
    """
    sums.flush()
    left_out, chosen = [], bool(sums.first_NDE.any())
    if looks_ahead:
        left_out.append(f"No surprise: {looks_ahead}")
    if not chosen:
        left_out.append(
            "No specialization, context independence and agreement: no token chooses an expert."
        )
    return {
        "tokens": sums.tokens,
        "documents": sums.documents,
        "confidence": statistics.CONFIDENCE,
        "left_out": left_out,
        "experts_per_token": {
            "fixed": sums.fixed,
            "all": sums.overall.estimates()[0].record(),
            "by_layer": _records(sums.by_layer.estimates()),
            "by_domain": _by_domain(sums),
            "by_token": _by_token(sums),
            "by_position": _by_position(sums),
            "by_place_in_word": _by_place_in_word(sums),
            **(
                {}
                if looks_ahead
                else {
                    "by_surprise_of_predicted_token": _by_surprise(sums, "predicted"),
                    "by_surprise_of_token_itself": _by_surprise(sums, "own"),
                }
            ),
        },
        "correlation_with_surprise": {} if looks_ahead else _correlations(sums),
        "load_by_layer": _loads(sums),
        "share_by_domain": _shares(sums),
        "specialization_by_layer": _specialization(sums) if chosen else [],
        "context_independence_by_layer": _context_independence(sums) if chosen else [],
        "dropped": _dropped(sums),
    }


def _records(estimates: list[Interval]) -> list[dict]:
    return [estimate.record() for estimate in estimates]


def _shares(sums: RoutingSums) -> dict[str, list[list[float]]]:
    """Share of each domain's tokens that use each expert, by layer."""
    share_NDE = sums.load_NDE / np.maximum(sums.tokens_D, 1)[:, None]
    return {
        name: [share_E[:own] for share_E, own in zip(share_NE, sums.experts_N, strict=True)]
        for name, share_NE in zip(sums.domains, share_NDE.swapaxes(0, 1), strict=True)
    }


def _by_domain(sums: RoutingSums) -> dict[str, dict]:
    by_layer = _records(sums.by_domain.estimates())
    return {
        name: estimate.record()
        | {"by_layer": by_layer[number * sums.layers : (number + 1) * sums.layers]}
        for number, (name, estimate) in enumerate(
            zip(sums.domains, sums.of_domain.estimates(), strict=True)
        )
    }


def _by_token(sums: RoutingSums) -> dict[str, Any]:
    means, ids = sums.by_token, np.array(list(sums.number_of_token), np.int64)
    count = means.count_G[: len(ids)]
    mean = means.mean_G[: len(ids)]
    often = np.flatnonzero(statistics.frequent(count, OFTEN))
    by_mean = often[np.argsort(-mean[often], kind="stable")]

    def named(numbers) -> list[dict]:
        numbers = [int(number) for number in numbers]
        return [
            {"id": int(ids[number]), "text": sums.words.text(int(ids[number]))} | estimate.record()
            for number, estimate in zip(
                numbers, means.estimates([[n] for n in numbers]), strict=True
            )
        ]

    return {
        "covered": 1 - sums.tokens_of_others / max(1, sums.tokens),
        "least_tokens": OFTEN,
        "most_frequent": named(np.argsort(-count, kind="stable")[:SHOWN_TOKENS]),
        "most_experts": named(by_mean[:SHOWN_TOKENS]),
        "fewest_experts": named(by_mean[::-1][:SHOWN_TOKENS]),
    }


def _by_position(sums: RoutingSums) -> list[dict]:
    found = []
    for number, estimate in enumerate(sums.by_position.estimates()):
        first, last = position_range(number)
        found.append({"from": first, "to": min(last, sums.length - 1)} | estimate.record())
    return [part for part in found if part["tokens"]]


def _by_place_in_word(sums: RoutingSums) -> list[dict]:
    estimates = sums.by_word_place.estimates()
    return [
        {"place": place, "and_later": place == WORD_PLACES - 1} | estimate.record()
        for place, estimate in enumerate(estimates)
        if estimate.tokens
    ]


def _by_surprise(sums: RoutingSums, which: str) -> list[dict]:
    means = sums.by_surprise[which]
    parts = statistics.joined(means.count_G.astype(float), _SURPRISE_PARTS)
    edges = np.concatenate([[0.0], SURPRISE_EDGES, [math.inf]])
    return [
        {
            "from": float(edges[part.start]),
            "to": float(edges[part.stop]),
            "surprise": float(sums.surprise_S[which][part].sum() / means.count_G[part].sum()),
        }
        | estimate.record()
        for part, estimate in zip(parts, means.estimates(parts), strict=True)
    ]


def _correlations(sums: RoutingSums) -> dict[str, dict]:
    documents = np.array([sums.documents])
    shape = len(SURPRISE_EDGES) + 1, -1

    def correlation(counts_X, counts_XR, layers: int = 1) -> list[dict]:
        table_NSC = counts_X.reshape(layers, *shape)
        tables_NRSC = counts_XR.T.reshape(counts_XR.shape[1], layers, *shape).swapaxes(0, 1)
        found = []
        for table_SC, tables_RSC in zip(table_NSC, tables_NRSC, strict=True):
            rho = statistics.spearman(table_SC.astype(float))
            replicate_R = statistics.spearman(tables_RSC.astype(float))
            low, high = statistics.intervals(rho[None], replicate_R[None], documents)
            found.append(
                {
                    "spearman": float(rho),
                    "low": float(np.maximum(low[0], -1.0)),
                    "high": float(np.minimum(high[0], 1.0)),
                }
            )
        return found

    own, predicted, layered = sums.met["own"], sums.met["predicted"], sums.met_by_layer
    by_layer = correlation(layered.count_G, layered.count_GR, sums.layers)
    return {
        "of_predicted_token": correlation(predicted.count_G, predicted.count_GR)[0]
        | {"by_layer": by_layer},
        "of_token_itself": correlation(own.count_G, own.count_GR)[0],
    }


def _loads(sums: RoutingSums) -> list[dict]:
    exists_NE = existing_experts(sums.experts_N, sums.load_NE.shape[1])
    return [
        {
            "max_over_mean": float(load_imbalance(load_E, exists_E)),
            "unused": unused_experts(load_E, exists_E),
            "share": (load_E[exists_E] / max(1, sums.tokens)).tolist(),
        }
        for load_E, exists_E in zip(sums.load_NE, exists_NE, strict=True)
    ]


def _specialization(sums: RoutingSums) -> list[dict]:
    def bits(table_XE) -> dict:
        found = statistics.mutual_information(table_XE)
        control = statistics.mutual_information(statistics.shuffled(table_XE))
        return {
            "bits": found,
            "shuffled": control,
            "corrected": found - control,
            "of": statistics.entropy(table_XE.sum(axis=0)),
        }

    return [
        {"domain": bits(first_DE), "token": bits(first_VE)}
        for first_DE, first_VE in zip(sums.first_NDE, sums.first_NVE, strict=True)
    ]


def _context_independence(sums: RoutingSums) -> list[dict]:
    found = []
    for first_VE, first_PE, first_DE in zip(
        sums.first_NVE, sums.first_NPE, sums.first_NDE, strict=True
    ):
        often_VE = first_VE[first_VE.sum(axis=1) >= OFTEN]
        found.append(
            {
                "token": statistics.largest_share(often_VE),
                "shuffled": statistics.largest_share(statistics.shuffled(often_VE)),
                "position": statistics.largest_share(first_PE, OFTEN),
                "domain": statistics.largest_share(first_DE, OFTEN),
                "token_ids": len(often_VE),
                "positions": min(sums.length, POSITIONS),
            }
        )
    return found


def _dropped(sums: RoutingSums) -> dict[str, Any]:
    edges = np.ceil(np.arange(len(sums.kept_P) + 1) * sums.length / len(sums.kept_P)).astype(int)
    rates = statistics.drop_rates(sums.chosen_P, sums.kept_P)
    return {
        "choices": int(sums.chosen_P.sum()),
        "dropped": int((sums.chosen_P - sums.kept_P).sum()),
        "rate": float(statistics.drop_rates(sums.chosen_P.sum(), sums.kept_P.sum())),
        "by_place_in_row": [
            {"from": int(edges[i]), "to": int(edges[i + 1] - 1), "rate": float(rate)}
            for i, rate in enumerate(rates)
        ],
    }
