"""What every compressor promises; the folder is listed, so a new file is tested automatically.

Those that leave parts out are held to more in `test_pruners.py`.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora import plugins
from fedlora.compressors.contract import LowRank, Statistic, compress, load
from fedlora.errors import SettingError

NAMES = plugins.names("compressors")


def layers(seed=0, shapes=((12, 20), (20, 12), (16, 16))):
    rng = np.random.default_rng(seed)
    return {
        f"layer{i}": (rng.standard_normal(shape) * np.geomspace(1, 0.01 * (i + 1), shape[1])).astype(np.float32)
        for i, shape in enumerate(shapes)
    }


def statistic(kind, into, seed=0, deviation=0.0):
    x = np.random.default_rng(seed).standard_normal((40, into)) * np.geomspace(3, 0.1, into)
    return Statistic(kind, x.T @ x / 40 if kind == "gram" else (x**2).mean(0), deviation)


FOUND = {name: plugins.find("compressors", name) for name in NAMES}
THIN = [name for name, cls in FOUND.items() if issubclass(cls, LowRank)]
CASES = [(n, kind) for n in THIN for kind in (*FOUND[n].takes, *(() if FOUND[n].needs else (None,)))]


def made(name, kind, keep, weights):
    told = {n: statistic(kind, w.shape[1]) for n, w in weights.items()} if kind else {}
    return compress(load(name, {"keep": keep}), weights, told)


@pytest.mark.parametrize(("name", "kind"), CASES)
@given(seed=st.integers(0, 2**16), keep=st.floats(0.2, 0.95))
def test_it_keeps_within_its_budget_and_says_the_error_that_it_makes(name, kind, seed, keep):
    weights = layers(seed)
    cuts = made(name, kind, keep, weights)
    assert list(cuts) == list(weights)
    assert sum(cut.numbers for cut in cuts.values()) <= keep * sum(w.size for w in weights.values())
    for layer, cut in cuts.items():
        weight = weights[layer].astype(np.float64)
        if cut.rank is None:
            assert (cut.left, cut.right, cut.error, cut.weighted) == (None, None, 0.0, 0.0)
            continue
        assert cut.rank * sum(weight.shape) < weight.size
        off = weight - cut.left.astype(np.float64) @ cut.right
        assert cut.error == pytest.approx(np.linalg.norm(off) / np.linalg.norm(weight))
        root = np.eye(weight.shape[1]) if kind is None else statistic(kind, weight.shape[1]).root()
        root = np.diag(root) if root.ndim == 1 else root
        told = np.linalg.norm(off @ root) / np.linalg.norm(weight @ root)
        assert cut.weighted == pytest.approx(told, abs=1e-6)
        # Eckart and Young: the tail of the singular values, and no other product of that rank does better.
        tail = np.linalg.svd(weight @ root, compute_uv=False)
        assert told == pytest.approx(np.sqrt((tail[cut.rank :] ** 2).sum() / (tail**2).sum()), abs=1e-6)
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        plain = u[:, : cut.rank] * s[: cut.rank] @ vt[: cut.rank]
        assert told <= np.linalg.norm((weight - plain) @ root) / np.linalg.norm(weight @ root) + 1e-6


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_all_is_kept_as_it_is_where_nothing_is_to_be_cut(name, kind):
    assert all(cut.rank is None and cut.error == 0 for cut in made(name, kind, 1.0, layers()).values())


@pytest.mark.parametrize("name", THIN)
def test_a_layer_without_a_statistic_stays_whole_where_one_is_needed(name):
    cls = plugins.find("compressors", name)
    cuts = compress(load(name, {}), layers(), {})
    assert all(cut.rank is None for cut in cuts.values()) is cls.needs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [0, -0.1, 1.01, float("nan")])
def test_a_share_out_of_range_is_refused_by_its_key(name, keep):
    with pytest.raises(SettingError, match=r"compress.keep.*should be above 0 and at most 1"):
        load(name, {"keep": keep})


@pytest.mark.parametrize("name", NAMES)
def test_another_option_is_refused(name):
    with pytest.raises(SettingError, match=r"compress.kept.*has no option 'kept': did you mean 'keep'"):
        load(name, {"kept": 0.5})


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_with_its_paper_and_has_a_line(name):
    assert plugins.summary("compressors", name).endswith(".")
    module = __import__(f"fedlora.compressors.{name}", fromlist=["x"])
    assert "https://" in module.__doc__
