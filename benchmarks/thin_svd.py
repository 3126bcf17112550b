"""The SVD of an average change through thin factors, against making the matrix and decomposing that.

    python benchmarks/thin_svd.py [--size 4096] [--clients 50] [--rank 16] [--repeats 3]

Both ways are given the same factors B_k (size x rank) and A_k (rank x size) of all clients, and find the
leading singular vectors of sum_k p_k B_k A_k in float64 and as a dense float32 matrix respectively, which
favours the dense way. Ways alternate; the median of each and their ratio are printed, and how far the two
rank-r approximations are apart.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from fedlora import factors

Parts = list[tuple[float, factors.NDArray, factors.NDArray]]


def main() -> None:
    """Measure, and print one line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    told = parser.parse_args()
    rng = np.random.default_rng(0)
    parts = [
        (
            1 / told.clients,
            rng.normal(size=(told.size, told.rank)).astype(np.float32),
            rng.normal(size=(told.rank, told.size)).astype(np.float32),
        )
        for _ in range(told.clients)
    ]
    seconds: dict[str, list[float]] = {"thin": [], "dense": []}
    found = {}
    for _ in range(told.repeats):
        for way, decompose in (("thin", thin), ("dense", dense)):
            began = time.perf_counter()
            u, s, vt = decompose(parts)
            seconds[way].append(time.perf_counter() - began)
            found[way] = (u[:, : told.rank] * s[: told.rank], vt[: told.rank])
    for way, taken in seconds.items():
        print(f"{way:<6} {statistics.median(taken):8.2f} s")
    ratio = statistics.median(d / t for d, t in zip(seconds["dense"], seconds["thin"], strict=True))
    both = factors.stack([(1.0, *found["thin"]), (-1.0, *found["dense"])])
    apart = factors.norm(*both) / factors.norm(*found["thin"])
    print(f"dense / thin {ratio:.0f}; rank-{told.rank} approximations differ by {apart:.1e}")


def thin(parts: Parts) -> tuple[factors.Matrix, factors.Matrix, factors.Matrix]:
    """As strategies do it."""
    return factors.svd(*factors.stack(parts))


def dense(parts: Parts) -> tuple[factors.Matrix, factors.Matrix, factors.Matrix]:
    """Make the matrix, decompose it."""
    total = sum(p * (b @ a) for p, b, a in parts)
    return np.linalg.svd(total, full_matrices=False)


if __name__ == "__main__":
    main()
