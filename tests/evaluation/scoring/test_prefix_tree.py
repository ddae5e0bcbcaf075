"""Trees of tokens: every text is a path, and sees nothing but itself."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmoe_jax.evaluation.scoring.prefix_tree import build_tree, common_length, group_texts

# Few different tokens: many common beginnings.
TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), min_size=1)


def test_tree_by_hand():
    # 5 6 7      rows in preorder: 5 6 7 8 9
    #   6 8                        0 1 2 2 0   depth
    # 9
    tree = build_tree([(5, 6, 8), (9,), (5, 6, 7), (5, 6)])
    assert tree.tokens.tolist() == [5, 6, 7, 8, 9]
    assert tree.depths.tolist() == [0, 1, 2, 2, 0]
    assert tree.ends.tolist() == [4, 4, 3, 4, 5]
    assert [path.tolist() for path in tree.paths] == [[0, 1, 3], [4], [0, 1, 2], [0, 1]]


@given(TEXTS)
def test_each_text_is_a_path_and_sees_itself_alone(texts):
    tree = build_tree(texts)
    assert len(tree.tokens) == len({text[:n] for text in texts for n in range(1, len(text) + 1)})
    for text, path in zip(texts, tree.paths, strict=True):
        assert tuple(tree.tokens[path]) == text
        assert tree.depths[path].tolist() == list(range(len(text)))
        for depth, i in enumerate(path):
            sees = [j for j in range(len(tree.tokens)) if j <= i < tree.ends[j]]
            assert sees == path[: depth + 1].tolist()


def test_common_length():
    assert common_length((1, 2, 3), (1, 2, 4)) == 2
    assert common_length((1, 2), (1, 2, 4)) == 2
    assert common_length((), (1,)) == 0


@settings(deadline=None)
@given(TEXTS, st.data())
def test_groups_hold_each_text_once_and_fit(texts, data):
    contexts = [data.draw(st.integers(1, len(text))) for text in texts]
    groups = list(group_texts(texts, contexts, most=9, worth=2))
    assert sorted(i for group in groups for i in group) == list(range(len(texts)))
    for group in groups:
        assert len(group) == 1 or len(build_tree([texts[i] for i in group]).tokens) <= 9


def test_one_context_is_one_group_and_few_shot_examples_are_shared():
    shots = tuple(range(100, 140))
    questions = [(*shots, *np.random.default_rng(i).integers(0, 9, 20)) for i in range(3)]
    texts = [(*question, ending) for question in questions for ending in (50, 51)]
    texts += [(1, 2, 3, 4, 5, 60), (1, 2, 3, 4, 5, 61), (7, 7, 7)]
    contexts = [len(text) - 1 for text in texts]
    groups = [sorted(group) for group in group_texts(texts, contexts, most=200)]
    assert sorted(groups) == [[0, 1, 2, 3, 4, 5], [6, 7], [8]]
    # 40 + 3 * 22 = 106 tokens do not fit into 90: the third question has its own tree.
    sizes = [len(group) for group in group_texts(texts[:6], contexts[:6], most=90)]
    assert sizes == [4, 2]
