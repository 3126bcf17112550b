"""The protocol: sums come out, single updates do not."""

import numpy as np
import pytest
from scipy.stats import chisquare

from fedlora.errors import ContractError, RoundError
from fedlora.privacy import graph, member, secure
from fedlora.privacy.cohorts import LEAST
from fedlora.privacy.collector import Collector, check, collect, pseudonyms
from fedlora.privacy.member import Member
from fedlora.privacy.noise import Stream
from fedlora.seeding import stream


def play(vectors, dropped=(), share=0.66, around=None):
    """A round by hand: who knows what is what the arguments say. Returns what the server was told, and the sum."""
    names = sorted(vectors)
    around = around or graph.neighbours(names)
    needed = graph.threshold(len(around[names[0]]), share)
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


@pytest.fixture
def small_rings(monkeypatch):
    """More than seven have a ring of six neighbours each, of whom with themselves six must stay."""
    monkeypatch.setattr(graph, "MOST_NEIGHBOURS", 6)


def test_on_a_ring_of_neighbours_too(small_rings):
    vectors = random_vectors(16)
    assert graph.neighbours(vectors)[1] == [0, 1, 2, 3, 4, 14, 15]
    _, total, _ = play(vectors, dropped=(2, 10))
    assert np.array_equal(total, sum((v for n, v in vectors.items() if n not in (2, 10)), np.zeros(50, np.uint32)))


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
        left = masked - secure.keystream(seed, 2000)
        assert not np.array_equal(left, vectors[name])
        assert abs(np.corrcoef(left, vectors[name])[0, 1]) < 5 / 2000**0.5
    for shares in told["shares"].values():  # nobody who sent has a share of a mask key given away
        assert set(shares) == set(vectors)


def test_shares_travel_encrypted_for_their_receiver_alone():
    members, sealed = shared()
    with pytest.raises(ContractError, match="did not seal for this client"):
        members[3].mask(np.zeros(1, np.uint32), {0: sealed[0][1]})  # client 1's, given to client 3


def shared(count=4, needed=3):
    """Members that have shared their keys and not yet masked, and the shares."""
    members = {n: Member(n) for n in range(count)}
    keys = {n: m.keys for n, m in members.items()}
    return members, {n: m.share(keys, needed) for n, m in members.items()}


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
    plain = graph.pack_view({}) + share_keys_plaintext_concat(2, 0, b"seed", b"key")
    forged = encrypt(members[1]._secret_with(0, 1), plain)
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
    with pytest.raises(ContractError, match="a second time"):
        fresh[0].share(keys, 4)


def test_a_member_reveals_for_just_those_whose_shares_came_itself_and_two_more_among_who_sent():
    """Of five one never shared: the set is fixed at four, of whom three would be too few for the threshold."""
    stories = {
        "itself dropped": ([1, 2, 3, 4], [0]),
        "somebody left out": ([0, 1, 2, 3], []),
        "a stranger": ([0, 1, 2, 3, 4, 9], []),
        "too few": ([0, 1, 2], [3, 4]),
        "twice": ([0, 1, 2, 3, 4, 4], []),
    }
    for sent, dropped in stories.values():
        members, sealed = shared(5, 4)
        members[0].mask(np.zeros(1, np.uint32), {o: sealed[o][0] for o in range(1, 5)})
        with pytest.raises(ContractError, match="single client"):
            members[0].reveal(sent, dropped)
    members, sealed = shared(5, 4)
    members[0].mask(np.zeros(1, np.uint32), {o: sealed[o][0] for o in (1, 2, 3)})
    for sent, dropped in (([0, 1, 2, 3], [4]), ([0, 1, 2], [3])):
        with pytest.raises(ContractError, match="single client"):
            members[0].reveal(sent, dropped)
    assert set(members[0].reveal([0, 1, 2, 3], [])) == {0, 1, 2, 3}
    unmasked, _ = shared(5, 4)
    with pytest.raises(ContractError, match="single client"):
        unmasked[0].reveal([0], [])


def test_a_threshold_below_two_thirds_and_one_is_refused():
    members = {n: Member(n) for n in range(6)}
    with pytest.raises(ContractError, match="too few neighbours"):
        members[0].share({n: m.keys for n, m in members.items()}, 4)
    with pytest.raises(ContractError, match="too few neighbours"):
        members[0].share({n: members[n].keys for n in (0, 1)}, 2)
    assert [graph.threshold(n, 0.66) for n in (3, 4, 6, 9, 20, 32, 33)] == [3, 3, 5, 7, 14, 22, 25]


def test_clients_that_see_different_neighbours_do_not_mask():
    """The server tells client 0 that it has two neighbours, and those that they have five."""
    members = {n: Member(n) for n in range(6)}
    keys = {n: m.keys for n, m in members.items()}
    sealed = {n: members[n].share(keys, 5) for n in (1, 2)}
    members[0].share({n: keys[n] for n in (0, 1, 2)}, 3)
    with pytest.raises(ContractError, match="do not go together"):
        members[0].mask(np.zeros(1, np.uint32), {n: sealed[n][0] for n in (1, 2)})


def test_keys_that_are_none_are_refused():
    members = {n: Member(n) for n in range(3)}
    keys = {n: m.keys for n, m in members.items()}
    with pytest.raises(ContractError, match="is none"):
        members[0].share({**keys, 1: (b"no key", b"no key")}, 3)
    other = {"mask": {0: keys[0][0], 1: keys[1][0], 2: keys[2][0]}, "share": {0: keys[0][1]}}
    with pytest.raises(ContractError, match="one of the two keys"):
        members[2].answer(secure.SHARES, other, lambda among: np.zeros(1, np.uint32), 0.66, 8)


def test_who_would_not_mask_reveals_nothing():
    """Else a client that sees another graph than its neighbours could be told any story."""
    members = {n: Member(n) for n in range(6)}
    keys = {n: m.keys for n, m in members.items()}
    sealed = {n: members[n].share({o: keys[o] for o in range(5)}, 4) for n in range(1, 5)}
    members[0].share(keys, 5)
    with pytest.raises(ContractError, match="do not go together"):
        members[0].mask(np.zeros(1, np.uint32), {n: sealed[n][0] for n in range(1, 5)})
    with pytest.raises(ContractError, match="single client"):
        members[0].reveal(range(5), [])


def test_clients_told_other_keys_of_a_neighbour_do_not_mask():
    members, invented = {n: Member(n) for n in range(4)}, Member(3)
    keys = {n: m.keys for n, m in members.items()}
    sealed = {n: members[n].share({**keys, 3: invented.keys}, 3) for n in (1, 2)}
    members[0].share(keys, 3)
    with pytest.raises(ContractError, match="do not go together"):
        members[0].mask(np.zeros(1, np.uint32), {n: sealed[n][0] for n in (1, 2)})


# A server that lies about who dropped out.


def stories(count, needed, partners, itself):
    """Whom each helper is told to have dropped, so that the mask keys of all partners may come out."""
    votes, told = dict.fromkeys(partners, 0), {}
    for helper in sorted(range(1, count), key=partners.__contains__):
        wanted = [p for p in sorted(partners, key=votes.__getitem__) if itself or p != helper]
        told[helper] = [p for p in wanted if votes[p] < needed][: count - needed]
        for p in told[helper]:
            votes[p] += 1
    return told


def lie(count, share, itself=False):
    """How many secrets of client 0's masks a server lacks that passes the shares of few on, and tells stories."""
    needed = graph.threshold(count, share)
    members = {n: Member(n) for n in range(count)}
    keys = {n: m.keys for n, m in members.items()}
    sealed = {n: m.share(keys, needed) for n, m in members.items()}
    partners = list(range(count - needed + 1, count))
    for n, m in members.items():
        m.mask(np.zeros(1, np.uint32), {o: sealed[o][n] for o in (partners if n == 0 else members) if o != n})
    seeds, mask_keys = [], {p: [] for p in partners}
    for helper, dropped in {0: [], **stories(count, needed, partners, itself)}.items():
        named = [0, *partners] if helper == 0 else members
        try:
            told = members[helper].reveal([n for n in named if n not in dropped], dropped)
        except ContractError:
            continue
        seeds.append(told[0])
        for p in dropped:
            mask_keys[p].append(told[p])
    known = [p for p, parts in mask_keys.items() if found(parts, needed) == members[p]._mask_secret]
    return len(partners) - len(known) + (found(seeds, needed) != members[0]._seed)


def found(parts, needed):
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares

    return combine_shares(parts[:needed]) if len(parts) >= needed else None


@pytest.fixture
def cheap(monkeypatch):
    """Shares and seals that cost nothing: who is refused what does not depend on them."""
    from flwr.common.secure_aggregation.crypto import shamir, symmetric_encryption

    monkeypatch.setattr(shamir, "create_shares", lambda secret, least, count: [secret] * count)
    monkeypatch.setattr(shamir, "combine_shares", lambda parts: parts[0])
    monkeypatch.setattr(symmetric_encryption, "encrypt", lambda key, plain: plain)
    monkeypatch.setattr(symmetric_encryption, "decrypt", lambda key, text: text)
    monkeypatch.setattr(member, "agree", lambda key, public: public)


@pytest.mark.parametrize("itself", [False, True], ids=["", "who is told that it dropped out itself"])
@pytest.mark.parametrize("share", [0.51, 0.55, 0.6, 0.66, 0.8])
def test_a_server_that_lies_about_who_dropped_out_takes_no_masks_off(cheap, share, itself):
    assert [n for n in range(3, 34) if not lie(n, share, itself=itself)] == []


def test_nor_with_real_shares_and_seals():
    assert lie(5, 0.51) and lie(3, 0.66, itself=True)


def test_no_stories_show_a_sum_of_fewer_than_three():
    """The count of the protocol's docstring: a clients whose sum would be seen, d whose mask keys that takes.

    Each of d must be called dropped by t clients. One that is not among the a fixed at most all n and calls n - t
    dropped; one that is has fixed no others than a + d.
    """
    for n in range(3, graph.MOST_NEIGHBOURS + 2):
        t = graph.threshold(n, 0)
        for a in range(1, LEAST):
            for d in range(max(t - a, 1), n - a + 1):
                assert t * d > a * max(a + d - t, 0) + (n - a) * (n - t)
    t, window = graph.threshold(33, 0), 2 * 33 - 1  # on a ring: who has a neighbour of one client for a neighbour
    assert all(t * (t - a) > window * (33 - t) for a in range(1, LEAST))


# Who is told what.


def recorded(cohort, fails=()):
    """A round of `collect` over members; what each client was told, and the sum."""
    members, told_to = {}, {c: [] for c in cohort}

    def exchange(what, told):
        made = {}
        for client, parts in told.items():
            told_to[client].append((what, parts))
            if (what, client) in fails:
                continue
            (name,) = parts["you"]
            one = members.setdefault(client, Member(name))
            made[client] = one.answer(what, parts, lambda among: np.array([among], np.uint32), 0.66, 8)
            check(what, parts, made[client], 1)
        return made

    return told_to, collect(exchange, cohort, stream(3, "test"), 0.66)


def test_a_client_is_told_who_is_in_a_round_by_pseudonyms_alone_and_how_many():
    told, made = recorded([2, 17, 42, 105])
    assert made.members == made.sent == (2, 17, 42, 105) and made.total.tolist() == [16]
    names = {name for exchanges in told.values() for _, parts in exchanges for of in parts.values() for name in of}
    assert names >= {4} and len(names) == 5 and min(names - {4}) > 2**40
    for exchanges in told.values():
        assert [list(parts["members"]) for what, parts in exchanges if what == secure.MASKED] == [[4]]
    assert pseudonyms(1000, Stream.fresh())[0] != pseudonyms(1000, Stream.fresh())[0]


@pytest.mark.parametrize(
    "fails, words",
    [
        ([(secure.KEYS, 0)], "2 clients are there"),
        ([(secure.SHARES, 0)], "2 of 3 clients shared their keys"),
        ([(secure.MASKED, 2)], "2 of 3 clients sent"),
    ],
)
def test_there_is_no_sum_of_two(fails, words):
    with pytest.raises(RoundError, match=words):
        recorded([0, 1, 2], fails)


def test_a_server_cannot_say_that_more_or_fewer_share_the_noise_out_than_do():
    members, sealed = shared()
    for number in (3, 5, 2**40):
        told = {"sealed": {o: sealed[o][0] for o in (1, 2, 3)}, "members": {number: b""}}
        with pytest.raises(ContractError, match="a number of clients that cannot be"):
            members[0].answer(secure.MASKED, told, lambda among: np.zeros(1, np.uint32), 0.66, 8)
    ring = {n: Member(n) for n in range(33)}
    ring[0]._around = dict.fromkeys(ring)
    for number, fits in ((8, False), (33, True), (100, True), (101, False)):
        told = {"sealed": dict.fromkeys(range(1, 33), b""), "members": {number: b""}}
        if fits:
            assert ring[0]._members(told, 100) == number
        else:
            with pytest.raises(ContractError, match="cannot be"):
                ring[0]._members(told, 100)


def test_shares_that_do_not_fit_together_are_a_failed_round():
    told, _, _ = play(random_vectors(4))
    spoiled = {n: {o: bytes(len(part)) for o, part in held.items()} for n, held in told["shares"].items()}
    with pytest.raises(RoundError, match="masks did not come off"):
        Collector(graph.neighbours(range(4)), told["keys"], 3).total(told["masked"], spoiled)


def test_too_few_left_are_a_failed_round():
    vectors = random_vectors(6)
    members = {n: Member(n) for n in vectors}
    keys = {n: m.keys for n, m in members.items()}
    around = {n: list(vectors) for n in vectors}
    sealed = {n: m.share(keys, 5) for n, m in members.items()}
    masked = {n: members[n].mask(vectors[n], {o: sealed[o][n] for o in vectors if o != n}) for n in range(3)}
    with pytest.raises(RoundError, match="0 of the 5 shares of a client came"):
        Collector(around, keys, 5).total(masked, {})
