"""Do harder tokens use more experts?  Rank correlations of experts with surprise, and two controls.

Surprise is the loss of a token: of the one that is predicted where the experts are used, or, apart
from it, of the one that is read there.  The controls: the same model with routers put back to where
training began, and the experts of tokens shuffled among all tokens of the same id.

Axis legend: N MoE layers, T tokens, R replicates.
"""

from typing import Any

import jax
import numpy as np
from flax import nnx

from dynmoe_jax.model import Decoder, decoder_shapes
from dynmoe_jax.study.measures.measure import Measure
from dynmoe_jax.study.measures.trained import Tokens, TrainedRun
from dynmoe_jax.study.rank_correlation import Correlation, RankCorrelations, shuffled_within


class Hardness(Measure):
    """MoE-Dynamic, as in the paper."""

    analyzes = True

    def is_of(self, model):
        """MoE-Dynamic alone."""
        return model == "dynamic"

    def passes(self, model):
        """The trained model's, and that with routers put back."""
        return 2

    def take(self, run, items):
        """Correlations of the trained model and of the controls, and its analysis of routing."""
        tokens = run.tokens
        untrained = run.with_router(run.config.model, with_first_routers(run))
        return {
            "tokens": len(tokens.token_T),
            "trained": correlations(tokens, tokens.experts_NT),
            "untrained": correlations(tokens, untrained.experts_NT),
            "shuffled": correlations(tokens, shuffled_within(tokens.experts_NT, tokens.token_T)),
            "bottom_less_top": _bottom_less_top(tokens),
            "experts_untrained": untrained.mean_experts,
            "routing": run.routing,
        }


def correlations(tokens: Tokens, experts_NT: np.ndarray) -> dict[str, Any]:
    """Rank correlations of experts with surprise, each with its replicates over documents.

    Args:
      tokens: whose surprise it is.
      experts_NT: experts that they use.
    """
    layers, number = experts_NT.shape
    document_T, id_T = tokens.document_T, np.unique(tokens.token_T, return_inverse=True)[1]
    mean_T, surprise_T, weights = experts_NT.mean(axis=0), tokens.nll_T, tokens.weight_DR
    own_T = np.concatenate([[0.0], surprise_T[:-1]])
    read_T = tokens.position_T > 0
    predicted = RankCorrelations(surprise_T, document_T, weights)
    itself = RankCorrelations(own_T[read_T], document_T[read_T], weights)
    repeated = (np.tile(x_T, layers) for x_T in (surprise_T, document_T))
    pairs, layer_S = RankCorrelations(*repeated, weights), np.repeat(np.arange(layers), number)
    found = {
        # Experts of a token: the mean over its layers.
        "predicted": predicted.whole(mean_T),
        "itself": itself.whole(mean_T[read_T]),
        "within_token_ids": predicted.within(mean_T, id_T),
        "across_token_ids": predicted.across(mean_T, id_T),
        # Of pairs of a token and a layer.
        "all_layers": pairs.whole(experts_NT.reshape(-1)),
        "within_layers": pairs.within(experts_NT.reshape(-1), layer_S),
    }
    by_layer = [predicted.whole(experts_T) for experts_T in experts_NT]
    return {name: _record(each) for name, each in found.items()} | {
        "by_layer": [_record(each) for each in by_layer]
    }


def _bottom_less_top(tokens: Tokens) -> dict[str, Any]:
    """Experts of the lowest MoE layer less those of the highest."""
    more_T = tokens.experts_NT[0].astype(float) - tokens.experts_NT[-1]
    return {"value": more_T.mean(), "value_R": tokens.replicates(more_T, np.ones_like(more_T))}


def _record(found: Correlation) -> dict[str, Any]:
    return {"value": found.value, "value_R": found.replicate_R}


def with_first_routers(run: TrainedRun) -> nnx.State:
    """The parameters of a run whose routers are those that its seed drew."""
    model = run.config.model
    names = {name for each in decoder_shapes(model).moe_feed_forwards for name in each.router_names}
    drawn = jax.jit(lambda key: nnx.state(Decoder(model, rngs=nnx.Rngs(params=key))))
    first = dict(drawn(jax.random.key(run.config.seed)).flat_state())
    kept = {
        path: first[path] if path[-1] in names else leaf for path, leaf in run.params.flat_state()
    }
    return nnx.State.from_flat_path(kept)
