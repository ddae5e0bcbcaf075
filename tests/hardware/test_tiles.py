"""The one chooser of tiles."""

from itertools import product

from dynmoe_jax.hardware.tiles import cheapest_tile

TILES = list(product((4, 2, 1), (8, 4)))


def area(m, n):
    return m * n


def test_the_cheapest_that_fits():
    assert cheapest_tile(TILES, area, 16, cost=lambda m, n: (-m * n, n)) == (4, 4)
    assert cheapest_tile(TILES, area, 15, cost=lambda m, n: abs(n - 6)) == (2, 4)


def test_without_a_cost_the_first_that_fits():
    assert cheapest_tile(TILES, area, 8) == (2, 4)


def test_nothing_fits():
    assert cheapest_tile(TILES, area, 3) is None
    assert cheapest_tile([], area, 3, cost=area) is None
