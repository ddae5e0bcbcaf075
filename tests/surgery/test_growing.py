"""Grown models: exact at mask 0 whatever is new, different at 1, and why plain padding is not."""

import numpy as np
import pytest

from dynmoe_jax.edits.places import Place
from dynmoe_jax.edits.roles import Role
from dynmoe_jax.edits.settings import edited
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.model.masks import MASK_NAMES
from dynmoe_jax.surgery.operations.grow import Grow
from tests.in_memory_surgery import drawn, logits, result_of, settings

OPERATORS = {
    "width": {"width": 24},
    "hidden_width": {"hidden_width": 40},
    "heads": {"num_heads": 6},
    "layers": {"num_layers": 5},
    "all": {"width": 24, "hidden_width": 40, "num_heads": 6, "num_layers": 5},
}


def relative(found, wanted):
    return np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max())


def with_masks(arrays, value):
    """The same arrays with all masks at a value; None: without any."""
    kept = {p: x for p, x in arrays.items() if p.array_name not in MASK_NAMES}
    if value is None:
        return kept
    return arrays | {p: np.full_like(x, value) for p, x in arrays.items() if p not in kept}


def grown(sizes, cfg=None, **more):
    cfg = cfg or settings()
    parent = cfg, drawn(cfg)
    return parent, result_of(Grow(**sizes, **{"init_std": 1.0} | more), parent)


@pytest.mark.parametrize("sizes", OPERATORS.values(), ids=OPERATORS)
def test_nothing_new_is_seen_while_masks_are_0(sizes):
    parent, result = grown(sizes)
    before, (cfg, arrays) = logits(*parent), result
    assert relative(logits(cfg, arrays), before) <= 1e-5
    assert relative(logits(cfg, with_masks(arrays, 1.0)), before) > 1e-2


def test_masks_of_1_compute_what_a_model_without_masks_does():
    _, (cfg, arrays) = grown(OPERATORS["all"])
    plain = edited(cfg, {"model.mask_steps": 0})
    whole = logits(plain, with_masks(arrays, None))
    assert relative(logits(cfg, with_masks(arrays, 1.0)), whole) <= 1e-6


@pytest.mark.parametrize("sizes", [{"width": 24}, {"num_layers": 5}], ids=["width", "layers"])
def test_plain_padding_changes_what_is_computed(sizes):
    # Even by zeros: the mean square of the norms is over more units, and copies of layers add up.
    parent, (cfg, arrays) = grown(sizes, init_std=0.0)
    padded = logits(edited(cfg, {"model.mask_steps": 0}), with_masks(arrays, None))
    assert relative(padded, logits(*parent)) > 1e-2


@pytest.mark.parametrize("router", ["top_p", "top_any"])
def test_mixtures_grow_too(router):
    moe = {"num_experts": 4, "hidden_width": 8, "every_n_layers": 2, "dense_first_layers": 1}
    moe |= {"shared_hidden_width": 8, "router": router}
    heads = {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True}
    cfg = settings(num_layers=3, tie_embeddings=True, moe=moe, **heads)
    sizes = {"width": 20, "num_heads": 12, "num_kv_heads": 4, "num_layers": 7}
    sizes |= {"hidden_width": 40, "expert_width": 12, "shared_width": 10}
    parent, (larger, arrays) = grown(sizes, cfg)
    assert relative(logits(larger, arrays), logits(*parent)) <= 1e-5
    assert [layer.is_moe for layer in larger.model.by_layer] == [False] + 3 * [True, False]


def test_what_has_grown_grows_on():
    cfg, arrays = grown({"width": 24, "num_layers": 3})[1]
    masks = {p: np.maximum(x, 0.5) for p, x in arrays.items() if p.array_name in MASK_NAMES}
    half = arrays | masks
    more, larger = result_of(Grow(num_heads=4, num_layers=6, init_std=1.0), (cfg, half))
    assert relative(logits(more, larger), logits(cfg, half)) <= 1e-5
    mask_D = larger[Place(None, "norm.mask_D")]
    np.testing.assert_array_equal(mask_D, [1] * 16 + [0.5] * 8)
    found = [float(larger[Place(i, "layer_mask")]) for i in range(6)]
    assert found == [1, 0, 0.5, 0, 1, 0]  # of layers 1, a copy at 0.5, 1


def test_moments_are_padded_with_zeros():
    cfg = settings()
    moments = {place: np.abs(x) + 1 for place, x in drawn(cfg).items()}
    _, arrays = result_of(Grow(width=24, num_layers=4), (cfg, moments), role=Role.SECOND)
    place = Place(2, "attention.query_DHW")
    np.testing.assert_array_equal(arrays[place][:16], moments[place.at(1)])
    assert not arrays[place][16:].any()
    assert not arrays[place.at(3)].any()


def test_query_heads_stay_with_their_keys():
    cfg = settings(num_heads=4, num_kv_heads=2)
    parent, (_, arrays) = grown({"num_heads": 6, "num_kv_heads": 2}, cfg)
    place = Place(0, "attention.output_HWD")
    np.testing.assert_array_equal(arrays[place][[0, 1, 3, 4]], parent[1][place])
    np.testing.assert_array_equal(arrays[Place(0, "attention.mask_H")], [1, 1, 0, 1, 1, 0])


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({}, "--width=32"),
        ({"width": 8}, "a model only grows"),
        ({"num_heads": 5}, "name num_kv_heads too"),
        ({"num_heads": 6, "num_kv_heads": 4}, "choose a multiple of 8"),
        ({"expert_width": 8}, "of nothing that a layer of it has"),
    ],
)
def test_what_cannot_grow_is_refused_in_a_sentence(sizes, said):
    cfg = settings(num_heads=4, num_kv_heads=2)
    with pytest.raises(ConfigError, match=said):
        Grow(**sizes).result([cfg])


def test_layers_that_differ_cannot_become_more():
    cfg = settings(layers="1:hidden_width=40")
    with pytest.raises(ConfigError, match="makes layers differ"):
        Grow(num_layers=4).result([cfg])
    assert Grow(width=24).result([cfg]).model.layers == cfg.model.layers


def test_layers_with_heads_of_their_own_lose_none_of_them():
    parent, result = grown({"num_heads": 4}, settings(layers="0:num_kv_heads=2"))
    assert relative(logits(*result), logits(*parent)) <= 1e-5
    with pytest.raises(ConfigError, match="num_kv_heads=2 of layer 0 does not keep at least 4"):
        Grow(num_heads=4).result([settings(layers="0:num_heads=4")])
