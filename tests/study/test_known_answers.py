"""The study's main question, asked where the answer is known: of routers that do, and do not.

Half of the tokens of a Markov source have one successor, the others have eight that are equally
likely.  One router gives the uncertain ones three experts and the others one; another one gives
numbers that have nothing to do with the tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.paper_claim import STATES, Chain, batch_of
from dynmoe_jax import config
from dynmoe_jax.evaluation.heldout import evaluate, make_eval_step
from dynmoe_jax.model import decoder_structure
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing import Bounds, Router, Routing
from dynmoe_jax.study.measures.hardness import correlations
from dynmoe_jax.study.measures.trained import Collector
from dynmoe_jax.study.questions.hardness import NEGLIGIBLE
from dynmoe_jax.study.questions.results import of_records
from dynmoe_jax.study.rank_correlation import shuffled_within
from dynmoe_jax.study.statistics import verdict
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import init_state, make_train_step

STEPS, LENGTH, BATCH, BOS = 60, 32, 16, STATES
_MOST = 3
SMALL = {
    "num_layers": 1,
    "width": 32,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_width": 16,
    "init_std": 0.1,
    "kernels": "plain",
}


class _Counted(Router):
    """A router whose tokens use the first experts, as many as ``count_T`` says."""

    reads = frozenset({"token_ids"})
    losses = {}  # noqa: RUF012

    def bounds(self, num_experts):
        return Bounds(_MOST, 1, 2.0, 2.0)

    def __call__(self, params, given):
        slot = jnp.arange(_MOST)
        used_TK = (slot < self.count_T(given)[:, None]) & given.valid_T[:, None]
        expert_TK = jnp.where(used_TK, slot, given.logits_TE.shape[1]).astype(jnp.int32)
        probs_TE = jax.nn.softmax(given.logits_TE)
        weight_TK = jnp.where(used_TK, probs_TE[:, :_MOST], 0.0)
        return Routing(expert_TK, weight_TK, probs_TE, given.logits_TE, probs_TE.shape[1])


@dataclasses.dataclass(frozen=True)
class _MoreWhereUncertain(_Counted):
    def count_T(self, given):
        return jnp.where(given.token_id_T < STATES // 2, _MOST, 1)


@dataclasses.dataclass(frozen=True)
class _AtRandom(_Counted):
    def count_T(self, given):
        place_T = jnp.arange(len(given.token_id_T), dtype=jnp.uint32)
        return 1 + ((place_T * jnp.uint32(2654435761)) >> 13) % _MOST


class _Tokenizer:
    bos_id, token_bytes_V = BOS, np.ones(STATES + 1, int)


def _with_bos(tokens):
    """Each sequence is a document."""
    return np.concatenate([np.full((*tokens.shape[:-1], 1), BOS), tokens], axis=-1)


def _heldout_tokens(name, kind):
    """Held-out tokens of a model that was trained with a router."""
    chain = Chain.drawn(0)
    with ROUTERS.temporarily(name, kind):
        moe = config.MoE(router=name, num_experts=4, hidden_width=16, backend="reference")
        model = config.Model(**SMALL, moe=moe, vocab_size=STATES + 1, max_seq_len=LENGTH + 1)
        cfg = dataclasses.replace(
            config.Config(),
            model=model,
            data=config.Data(seq_len=LENGTH),
            train=config.Train(batch_size=BATCH, steps=STEPS),
            optimizer=config.Optimizer(learning_rate=1e-2, warmup_steps=5),
        )
        schedule = make_schedule(cfg.optimizer, STEPS)
        optimizer = make_optimizer(cfg.optimizer, schedule)
        step = jax.jit(make_train_step(cfg, optimizer, schedule))
        state = jax.jit(lambda key: init_state(cfg, optimizer, key))(jax.random.key(0))
        data = _with_bos(chain.sequences(1, STEPS * BATCH, LENGTH))
        for batch in data.reshape(STEPS, BATCH, -1):
            state, _ = step(state, batch_of(jnp.asarray(batch)))
        heldout = _with_bos(chain.sequences(2, 4 * BATCH, LENGTH)).reshape(4, BATCH, -1)
        batches = {"chain": [jax.tree.map(np.asarray, batch_of(batch)) for batch in heldout]}
        collector = Collector(_Tokenizer())
        run = make_eval_step(decoder_structure(cfg.model), cfg.loss)
        evaluate(run, state.params, batches, _Tokenizer.token_bytes_V, watch=collector.watch)
        return collector.tokens()


def _answer(tokens, experts_NT, kind):
    found = of_records([correlations(tokens, experts_NT)[kind]], "value")
    return verdict(found, least=NEGLIGIBLE, of_training=False)


@pytest.fixture(scope="module")
def informed():
    return _heldout_tokens("more_where_uncertain", _MoreWhereUncertain)


@pytest.mark.slow
def test_a_router_that_gives_uncertain_tokens_more_is_found_out(informed):
    tokens = informed
    assert tokens.document_T[-1] + 1 == 4 * BATCH
    uncertain_T = tokens.token_T < STATES // 2
    assert tokens.nll_T[uncertain_T].mean() > tokens.nll_T[~uncertain_T].mean() + 0.5
    assert _answer(tokens, tokens.experts_NT, "predicted") == "yes"
    assert _answer(tokens, tokens.experts_NT, "across_token_ids") == "yes"


def test_where_the_id_alone_decides_nothing_is_left_within_ids(informed):
    within = correlations(informed, informed.experts_NT)["within_token_ids"]
    assert np.isnan(within["value"])
    shuffled = shuffled_within(informed.experts_NT, informed.token_T)
    np.testing.assert_array_equal(shuffled, informed.experts_NT)


@pytest.mark.slow
def test_a_router_with_random_numbers_is_found_out():
    tokens = _heldout_tokens("at_random", _AtRandom)
    assert set(np.unique(tokens.experts_NT)) == {1, 2, 3}
    for kind in ("predicted", "itself", "within_token_ids"):
        assert _answer(tokens, tokens.experts_NT, kind) in ("no", "undecided"), kind
    assert _answer(tokens, tokens.experts_NT, "predicted") == "no"
