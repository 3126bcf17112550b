"""The protocol: sums come out, single updates do not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from fedlora import secure
from fedlora.errors import ContractError, RoundError
from fedlora.secure import Collector, Member


def play(vectors, dropped=(), share=0.66, around=None):
    """A round by hand: who knows what is what the arguments say. Returns what the server was told, and the sum."""
    names = sorted(vectors)
    around = around or secure.neighbours(names, np.random.default_rng(0))
    needed = secure.threshold(len(around[names[0]]), share)
    members = {n: Member(n) for n in names}
    keys = {n: m.keys for n, m in members.items()}
    sealed = {n: m.share({o: keys[o] for o in around[n]}, needed) for n, m in members.items()}
    there = [n for n in names if n not in dropped]
    masked = {n: members[n].mask(vectors[n], {o: sealed[o][n] for o in around[n] if o != n}) for n in there}
    shares = {
        n: members[n].reveal([o for o in around[n] if o in there], [o for o in around[n] if o not in there])
        for n in there
    }
    told = {"keys": keys, "sealed": sealed, "masked": masked, "shares": shares}
    return told, Collector(around, keys, needed).total(masked, shares), members


def random_vectors(count, size=50, seed=1):
    rng = np.random.default_rng(seed)
    return {n: rng.integers(0, 2**32, size, dtype=np.uint32) for n in range(count)}


@pytest.mark.parametrize("dropped", [(), (3,), (0, 4, 9, 13, 19)], ids=len)
def test_twenty_clients_and_five_dropouts_sum_exactly(dropped):
    vectors = random_vectors(20)
    _, total, _ = play(vectors, dropped)
    expected = sum((v for n, v in vectors.items() if n not in dropped), np.zeros(50, np.uint32))
    assert np.array_equal(total, expected)


def test_on_a_ring_of_neighbours_too():
    around = {n: sorted((n + step) % 12 for step in range(-3, 4)) for n in range(12)}
    vectors = random_vectors(12)
    _, total, _ = play(vectors, dropped=(2, 7), around=around)
    assert np.array_equal(total, sum((v for n, v in vectors.items() if n not in (2, 7)), np.zeros(50, np.uint32)))


def test_a_large_cohort_has_a_ring_and_a_small_one_everybody():
    ring = secure.neighbours(range(100), np.random.default_rng(0))
    assert {len(a) for a in ring.values()} == {33} and all(m in a for m, a in ring.items())
    assert all(m in ring[o] for m, a in ring.items() for o in a)
    assert secure.neighbours([4, 2, 9], np.random.default_rng(0)) == {m: [2, 4, 9] for m in (4, 2, 9)}


def test_what_the_server_sees_of_a_client_is_chance():
    """The same vector of zeros, sent by ten clients, is ten uniform ones: chi-square at one in a million."""
    told, total, _ = play({n: np.zeros(4000, np.uint32) for n in range(10)})
    assert not total.any()
    for vector in told["masked"].values():
        assert chisquare(np.bincount(vector >> 24, minlength=256)).pvalue > 1e-6
    pooled = np.stack(list(told["masked"].values()))
    assert np.abs(np.corrcoef(pooled) - np.eye(10)).max() < 5 / 4000**0.5
    assert len({v.tobytes() for v in told["masked"].values()}) == 10


def test_all_that_the_server_is_told_takes_no_single_mask_off():
    """With the seeds of those who sent, which it learns, a vector is still under the masks of its neighbours."""
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares

    vectors = random_vectors(6, size=2000)
    told, _, _ = play(vectors)
    for name, masked in told["masked"].items():
        seed = combine_shares([held[name] for held in told["shares"].values()])
        left = masked - secure._stream(seed, 2000)
        assert not np.array_equal(left, vectors[name])
        assert abs(np.corrcoef(left, vectors[name])[0, 1]) < 5 / 2000**0.5
    for shares in told["shares"].values():  # nobody who sent has a share of a mask key given away
        assert set(shares) == set(vectors)


def test_shares_travel_encrypted_for_their_receiver_alone():
    from cryptography.fernet import InvalidToken

    members, sealed = shared()
    with pytest.raises(InvalidToken):
        members[3].mask(np.zeros(1, np.uint32), {0: sealed[0][1]})  # client 1's, given to client 3


def shared(count=4):
    """Members that have shared their keys and not yet masked, and the shares."""
    members = {n: Member(n) for n in range(count)}
    keys = {n: m.keys for n, m in members.items()}
    return members, {n: m.share(keys, 3) for n, m in members.items()}


def test_a_second_vector_under_the_same_masks_would_show_a_difference_and_is_refused():
    members, sealed = shared()
    told = {o: sealed[o][0] for o in (1, 2, 3)}
    members[0].mask(np.zeros(1, np.uint32), told)
    with pytest.raises(ContractError, match="second vector under the same masks"):
        members[0].mask(np.ones(1, np.uint32), told)


def test_shares_of_strangers_are_not_revealed():
    members, sealed = shared()
    members[0].mask(np.zeros(1, np.uint32), {o: sealed[o][0] for o in (1, 2, 3)})
    with pytest.raises(ContractError, match="single client"):
        members[0].reveal([0, 1, 2, 3, 9], [])


def test_shares_under_another_clients_name_are_refused():
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt
    from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat

    members, _ = shared()
    forged = encrypt(members[1]._secret_with(0, 1), share_keys_plaintext_concat(2, 0, b"seed", b"key"))
    with pytest.raises(ContractError, match="shares of client 2 for 0 came as those of 1"):
        members[0].mask(np.zeros(1, np.uint32), {1: forged})


def test_a_member_never_tells_both_secrets_of_another():
    _, _, members = play(random_vectors(5))
    with pytest.raises(ContractError, match="single client"):
        members[0].reveal([1, 2, 3, 4], [])  # a second time
    fresh = {n: Member(n) for n in range(5)}
    keys = {n: m.keys for n, m in fresh.items()}
    sealed = {n: m.share(keys, 4) for n, m in fresh.items()}
    fresh[0].mask(np.zeros(1, np.uint32), {o: sealed[o][0] for o in range(1, 5)})
    for sent, dropped in (([0, 1, 2, 3, 4], [1]), ([0, 1, 2], [3, 4])):
        with pytest.raises(ContractError, match="single client"):
            fresh[0].reveal(sent, dropped)
    with pytest.raises(ContractError, match="not its own"):
        Member(0).share(keys, 4)


def test_too_few_left_are_a_failed_round():
    vectors = random_vectors(6)
    members = {n: Member(n) for n in vectors}
    keys = {n: m.keys for n, m in members.items()}
    around = {n: list(vectors) for n in vectors}
    sealed = {n: m.share(keys, 4) for n, m in members.items()}
    masked = {n: members[n].mask(vectors[n], {o: sealed[o][n] for o in vectors if o != n}) for n in range(3)}
    with pytest.raises(RoundError, match="0 of the 4 shares of client 0 came"):
        Collector(around, keys, 4).total(masked, {})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=30), st.integers(1, 8))
def test_sums_of_quantised_numbers_are_off_by_a_step_each_at_most(values, count):
    numbers, rng = np.array(values), np.random.default_rng(0)
    total = sum((secure.quantise(numbers, 3.0, rng) for _ in range(count)), np.zeros(len(numbers), np.uint32))
    assert np.abs(secure.dequantise(total, 3.0) - count * numbers).max() <= count * 3.0 / 2**19 + 1e-12


def test_rounding_is_right_on_average():
    rng = np.random.default_rng(0)
    drawn = secure.dequantise(secure.quantise(np.full(40_000, 0.25 * 2**-19), 1.0, rng), 1.0) * 2**19
    assert set(drawn) == {0.0, 1.0} and abs(drawn.mean() - 0.25) < 5 * (0.1875 / 40_000) ** 0.5


def test_a_number_beyond_the_range_is_refused():
    with pytest.raises(ContractError, match=r"changed by 1\.5, and secure_aggregation\.range is 1"):
        secure.quantise(np.array([0.0, -1.5]), 1.0, np.random.default_rng(0))
