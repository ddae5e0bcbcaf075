"""Statistics of routing and the sums that they are made of, on made arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dynmoe_jax.evaluation.heldout import _first_choice
from dynmoe_jax.evaluation.routing import statistics
from dynmoe_jax.evaluation.routing.analyze import agreement
from dynmoe_jax.evaluation.routing.gather import RoutingSums, TokenUse
from dynmoe_jax.evaluation.routing.record import to_record
from dynmoe_jax.evaluation.routing.sums import Documents, GroupedMeans
from dynmoe_jax.evaluation.routing.words import Words
from dynmoe_jax.routing import RouterInput, Routing
from dynmoe_jax.routing.routers import Hash
from dynmoe_jax.routing.transforms import dropped
from dynmoe_jax.routing.transforms.capacity import Capacity

E, L, BOS = 8, 64, 1


class Tokenizer:
    """Token 2 + n is the n-th piece; 0 and 1 are controls."""

    pieces = ("", "", " the", "ory", " of", " ", "\n", "rout", "er", "s", ".")
    vocab_size, bos_id = 300, BOS

    def encode(self, text):
        return np.array([7])

    def decode(self, ids):
        return "".join(self.pieces[i] if i < len(self.pieces) else f" w{i}" for i in ids)


def batch_of(rows, length=L):
    """A batch of lists of documents, each packed into a row of its own; BOS begins a document."""
    shape = len(rows), length
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
    for row, documents in enumerate(rows):
        at = 0
        for number, tokens in enumerate(documents):
            part = slice(at, at + len(tokens))
            batch["tokens"][row, part] = tokens
            batch["segment_ids"][row, part] = number + 1
            batch["positions"][row, part] = np.arange(len(tokens))
            at += len(tokens)
    return batch


def analyzed(choose, batches=12, rows=4, layers=1, nll=None, slots=E):
    """The record of routing by ``choose(batch) -> (first_BL, experts_BL, kept_BL)``."""
    rng = np.random.default_rng(0)
    sums = RoutingSums(["only"], [E] * layers, [slots] * layers, L, Tokenizer())
    for _ in range(batches):
        documents = [
            [np.r_[BOS, rng.integers(11, 60, L // 2 - 1)] for _ in "ab"] for _ in range(rows)
        ]
        batch = batch_of(documents)
        first, experts, kept = (np.stack([x] * layers) for x in choose(batch))
        nll_BL = rng.exponential(2.0, first.shape[1:]) if nll is None else nll(batch, experts)
        load_NE = [np.bincount(f[f >= 0], minlength=E) for f in first]
        sums.add("only", batch, TokenUse(nll_BL, experts, first, kept), np.array(load_NE))
    return sums, to_record(sums)


def hashed(key):
    """Choices by a hash of some integers, by the package's own router."""

    def choose(batch):
        ids_T = jnp.asarray(key(batch).reshape(-1))
        given = RouterInput(
            None, jnp.zeros((ids_T.size, E)), jnp.ones(ids_T.size, bool), token_id_T=ids_T
        )
        first = np.asarray(_first_choice(Hash()({}, given))).reshape(batch["tokens"].shape)
        return first, np.ones_like(first), np.ones_like(first)

    return choose


def test_a_router_that_hashes_token_ids_is_independent_of_context():
    (found,) = analyzed(hashed(lambda batch: batch["tokens"]))[1]["context_independence_by_layer"]
    assert found["token"] == 1.0
    assert found["token"] > found["shuffled"] + 0.4
    assert found["position"] < 0.5


def test_a_router_that_hashes_positions_is_at_chance():
    record = analyzed(hashed(lambda batch: batch["positions"]))[1]
    (found,) = record["context_independence_by_layer"]
    assert found["position"] == 1.0
    # BOS alone is always at position 0.
    assert found["token"] == pytest.approx(found["shuffled"], abs=0.02)
    (special,) = record["specialization_by_layer"]
    assert abs(special["token"]["corrected"]) < 0.08


def test_mutual_information_of_a_table_by_hand():
    # Domain a always takes expert 0, domain b one of two evenly: H(E) - H(E | domain), with
    # P(E=0) = 3/4 and H(E | b) = 1 bit for half of the tokens.
    table = np.array([[4, 0], [2, 2]])
    wanted = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)) - 0.5
    assert statistics.mutual_information(table) == pytest.approx(wanted)
    assert statistics.mutual_information(np.array([[3, 3], [1, 1]])) == pytest.approx(0, abs=1e-12)
    assert statistics.mutual_information(5 * np.eye(4, dtype=int)) == pytest.approx(2)


def test_shuffled_table_keeps_margins_and_has_the_bias_alone():
    rng = np.random.default_rng(0)
    table = np.histogram2d(*rng.integers(0, 8, (2, 2000)), bins=8)[0].astype(int)
    control = statistics.shuffled(table)
    for axis in (0, 1):
        np.testing.assert_array_equal(control.sum(axis), table.sum(axis))
    # (8 - 1)^2 / (2 n ln 2) bits, Miller and Madow's, is what independent variables show.
    bias = 49 / (2 * 2000 * np.log(2))
    assert statistics.mutual_information(control) == pytest.approx(bias, rel=0.6)


def test_spearman_of_a_table_is_that_of_scipy():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 7, 500)
    y = np.minimum(x, rng.integers(0, 5, 500))
    table = np.zeros((7, 5))
    np.add.at(table, (x, y), 1)
    assert statistics.spearman(table) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.isnan(statistics.spearman(np.ones((7, 1))))


def test_correlation_of_a_pass_is_that_of_scipy_and_tells_predicted_from_own():
    rng = np.random.default_rng(3)
    seen = {"x": [], "nll": [], "own": []}

    def choose(batch):
        experts = rng.integers(1, 5, batch["tokens"].shape)
        return experts - 1, experts, experts

    def nll(batch, experts):
        values = experts[0] + rng.exponential(3.0, experts[0].shape)
        inner = batch["positions"][:, 1:] > 0
        seen["x"].append(experts[0].reshape(-1))
        seen["nll"].append(values.reshape(-1))
        seen["own"].append(np.stack([experts[0][:, 1:][inner], values[:, :-1][inner]]))
        return values

    _, record = analyzed(choose, nll=nll, layers=2)
    found = record["correlation_with_surprise"]
    wanted = stats.spearmanr(np.concatenate(seen["x"]), np.concatenate(seen["nll"])).statistic
    assert found["of_predicted_token"]["spearman"] == pytest.approx(wanted, abs=0.01)
    assert found["of_predicted_token"]["by_layer"][1]["spearman"] == pytest.approx(wanted, abs=0.01)
    assert found["of_predicted_token"]["low"] < wanted < found["of_predicted_token"]["high"]
    own = stats.spearmanr(*np.concatenate(seen["own"], axis=1)).statistic
    assert found["of_token_itself"]["spearman"] == pytest.approx(own, abs=0.01)
    assert abs(own) < 0.1 < wanted
    rising = record["experts_per_token"]["by_surprise_of_predicted_token"]
    assert rising[-1]["mean"] > rising[0]["mean"] + 0.3


def test_agreement_of_identical_checkpoints_is_one():
    rng = np.random.default_rng(0)
    first, other = rng.integers(0, E, (2, 3, 4000))
    document = np.repeat(np.arange(40), 100)
    same = agreement(first, first, document, E)
    assert [part["mean"] for part in same["by_layer"]] == [1.0] * 3
    found = agreement(first, other, document, E)
    np.testing.assert_allclose(found["chance_by_layer"], 1 / E, atol=0.01)
    for part in found["by_layer"]:
        assert part["low"] < 1 / E + 0.01 < part["high"] + 0.02


def test_drops_rise_with_position_and_add_up_to_the_counter_of_the_transform():
    """Imbalanced choices, capacity factor 1, places by token."""
    transform, counted = Capacity(factor=1.0, minimum=1, priority="token"), []
    capacity = jax.jit(lambda routing: transform(routing, None))
    rng = np.random.default_rng(0)

    def choose(batch):
        shape = batch["tokens"].shape
        # Every second token wants expert 0, which has room for an eighth of all; no other is full.
        place = batch["positions"] + L // 2 * (batch["segment_ids"] - 1)
        spread = 1 + (place // 2 + rng.integers(7)) % 7
        expert = np.where(place % 2 == 0, 0, spread).reshape(-1, 1)
        ones = jnp.ones(expert.shape, jnp.float32)
        nothing = jnp.zeros((len(expert), E))
        routing = Routing(jnp.asarray(expert), ones, nothing, nothing, E)
        kept = capacity(routing)
        counted.append(int(dropped(routing, kept)))
        first = np.asarray(_first_choice(routing)).reshape(shape)
        return first, np.ones(shape, int), np.asarray(kept.experts_per_token_T).reshape(shape)

    _, record = analyzed(choose, rows=1, batches=5)
    found = record["dropped"]
    assert found["dropped"] == sum(counted) > 0
    assert found["rate"] == pytest.approx(sum(counted) / record["tokens"])
    rates = np.array([part["rate"] for part in found["by_place_in_row"]])
    assert [part["from"] for part in found["by_place_in_row"]] == list(range(0, L, 4))
    assert np.all(np.diff(rates) >= 0)
    assert rates.tolist() == [0.0] * 4 + [0.5] * 12


def test_the_drop_curve_of_one_wish_is_a_step():
    capacity = Capacity(factor=1.0, minimum=1, priority="token")

    def choose(batch):
        shape = batch["tokens"].shape
        nothing = jnp.zeros((batch["tokens"].size, E))
        wish = jnp.zeros((batch["tokens"].size, 1), jnp.int32)
        kept = capacity(Routing(wish, jnp.ones(wish.shape), nothing, nothing, E), None)
        left = np.asarray(kept.experts_per_token_T).reshape(shape)
        return np.zeros(shape, int), np.ones(shape, int), left

    record = analyzed(choose, rows=2, batches=2)[1]
    rates = [part["rate"] for part in record["dropped"]["by_place_in_row"]]
    # 16 of 128 tokens find room, those at the beginning of the first row.
    assert rates == [0.5] * 4 + [1.0] * 12
    assert record["dropped"]["rate"] == 1 - 1 / E


def test_intervals_cover_the_truth():
    """Documents of different lengths and means: 95 % of the intervals hold the true mean."""
    rng, hits, trials = np.random.default_rng(0), 0, 200
    weight = np.random.default_rng(1).poisson(1.0, (30, 200)).astype(np.float32)
    for _ in range(trials):
        length = rng.integers(5, 40, 30)
        document = np.repeat(np.arange(30), length)
        value = rng.normal(2.0, 0.5, 30)[document] + rng.normal(0, 0.3, len(document))
        means = GroupedMeans(1)
        means.add(Documents(document, 0, weight), np.zeros(len(document), int), value)
        (found,) = means.estimates()
        hits += found.low <= 2.0 <= found.high
        assert found.mean == pytest.approx(value.mean())
    assert 0.91 <= hits / trials <= 0.985


def test_sums_do_not_depend_on_how_documents_are_cut_into_batches():
    rng = np.random.default_rng(0)
    number = np.repeat(np.arange(5), 20)
    group, value = rng.integers(-1, 3, 100), rng.random(100)
    whole, parts = GroupedMeans(3), GroupedMeans(3)
    whole.add(Documents.numbered(number), group, value)
    for part in np.split(np.arange(100), (13, 15, 55)):
        parts.add(Documents.numbered(number[part]), group[part], value[part])
    np.testing.assert_array_equal(whole.documents_G, parts.documents_G)
    np.testing.assert_allclose(whole.sum_GR, parts.sum_GR, rtol=1e-5)
    for one, other in zip(whole.estimates(), parts.estimates(), strict=True):
        assert (one.mean, one.low) == pytest.approx((other.mean, other.low))


def test_shares_of_domains_are_of_their_own_tokens():
    sums = RoutingSums(["code", "prose"], [E], [1], L, Tokenizer())
    for domain, expert, rows in (("code", 0, 1), ("prose", 1, 3), ("code", 2, 1)):
        batch = batch_of([[np.r_[BOS, np.full(L - 1, 12)]]] * rows)
        first = np.full((1, rows, L), expert)
        use = TokenUse(np.ones((rows, L)), np.ones_like(first), first, np.ones_like(first))
        sums.add(domain, batch, use, np.bincount([expert] * rows * L, minlength=E)[None])
    shares = to_record(sums)["share_by_domain"]
    np.testing.assert_array_equal(shares["code"], [np.isin(np.arange(E), [0, 2]) / 2])
    np.testing.assert_array_equal(shares["prose"], [np.arange(E) == 1])


def test_one_document_has_no_interval():
    means = GroupedMeans(1)
    means.add(Documents.numbered(np.zeros(9, int)), np.zeros(9, int), np.arange(9.0))
    (found,) = means.estimates()
    assert found.mean == 4
    assert np.isnan(found.low)


def test_places_in_words():
    # BOS the ory . newline of space rout er s
    tokens = np.array([1, 2, 3, 10, 6, 4, 5, 7, 8, 9])
    begins = np.arange(10) == 0
    assert Words(Tokenizer()).places(tokens, begins).tolist() == [-1, 0, 1, 2, -1, 0, -1, 0, 1, 2]


def test_first_choice_is_the_heaviest_and_nobody_has_none():
    nothing = jnp.zeros((3, 4))
    expert = jnp.array([[2, 1], [3, 4], [4, 4]])
    routing = Routing(expert, jnp.array([[0.2, 0.7], [0.5, 0.0], [0.0, 0.0]]), nothing, nothing, 4)
    assert _first_choice(routing).tolist() == [1, 3, -1]


def test_a_router_that_looks_ahead_has_no_word_about_surprise():
    sums, _ = analyzed(hashed(lambda batch: batch["tokens"]), batches=1)
    record = to_record(sums, "the router looks at later tokens.")
    assert record["left_out"] == ["No surprise: the router looks at later tokens."]
    assert record["correlation_with_surprise"] == {}


def test_tokens_that_choose_nobody_say_nothing_of_choices():
    def choose(batch):
        everyone = np.full(batch["tokens"].shape, E)
        return -np.ones_like(everyone), everyone, everyone

    record = analyzed(choose, batches=1)[1]
    assert "no token chooses an expert" in record["left_out"][0]
    assert record["specialization_by_layer"] == []
    assert record["experts_per_token"]["all"]["mean"] == E
