"""Who is whose neighbour, and what clients may be told of it."""

import pytest

from fedlora.errors import ContractError
from fedlora.privacy import graph


def test_a_large_cohort_has_a_ring_and_a_small_one_everybody():
    ring = graph.neighbours(range(100))
    assert {len(a) for a in ring.values()} == {33} and all(m in a for m, a in ring.items())
    assert all(m in ring[o] for m, a in ring.items() for o in a)
    assert graph.neighbours([4, 2, 9]) == {m: [2, 4, 9] for m in (4, 2, 9)}


def test_pieces_of_one_ring_go_together_and_others_do_not(monkeypatch):
    """Sixteen on a ring with three neighbours on each side; then 1 has its piece from another ring."""
    monkeypatch.setattr(graph, "MOST_NEIGHBOURS", 6)
    ring = graph.neighbours([10 * n for n in range(16)])
    views = {n: {o: bytes([o]) for o in around} for n, around in ring.items() if n in ring[0]}
    graph.check_views(views)
    far = {o: bytes([o]) for o in (0, 10, 20, 30, 140, 150, 155)}  # a client that nobody else sees
    for wrong in (
        {10: far},
        {10: {**views[10], 20: b"other keys"}},
        {10: {o: d for o, d in views[10].items() if o != 20}},
        {10: {o: d for o, d in views[10].items() if o != 10} | {50: bytes([50])}},
    ):
        with pytest.raises(ContractError, match="do not go together"):
            graph.check_views(views | wrong)
