"""What a dictionary with sparse codes would bring beside low rank, at equal numbers: layers of MiniLM, by weights.

    python benchmarks/dictionary.py [--keep 0.7] [--tokens 1024]

CoSpaDi (https://arxiv.org/abs/2509.22075) writes a weight W (d x n) as `D S`, with k = 2 s atoms and s numbers in
each column of S. Here D has orthonormal columns, so that the best codes are the s largest of `D^T W`, and the best
D for given codes is the polar factor of `W S^T`. The best dictionary of any kind is at least as good. It is
compared with a product of rank r of as many numbers, `keep d n`; where those of S stand is not counted. The last
figure is the time of a product and of the gradient of its input, over that of low rank.
"""

import argparse
import time

import numpy as np
import torch

from fedlora import compressing


def dictionary(weight: np.ndarray, keep: float, turns: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """D (d x k) and S (k x n) of a weight (d x n), with d <= n."""
    d, n = weight.shape
    s = int(keep * d * n / (2 * d + n))
    k = min(2 * s, d)
    basis = np.linalg.svd(weight, full_matrices=False)[0][:, :k]
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(k, k)))[
        0
    ]  # singular vectors are where it would stay
    atoms, codes = basis @ turn, np.zeros((k, n))
    for _ in range(turns):
        codes = atoms.T @ weight
        codes[np.argsort(-np.abs(codes), axis=0)[s:], np.arange(n)] = 0.0
        left, _, right = np.linalg.svd(weight @ codes.T, full_matrices=False)
        atoms = left @ right
    return atoms, codes


def error(weight: np.ndarray, made: np.ndarray) -> float:
    """How far a weight is from what was made of it, relative to its length."""
    return float(np.linalg.norm(weight - made) / np.linalg.norm(weight))


def seconds(product, x: torch.Tensor, times: int = 20) -> float:
    """The median time of a product and of the gradient of its input."""
    took = []
    for _ in range(times):
        x.grad, began = None, time.perf_counter()
        product(x).sum().backward()
        took.append(time.perf_counter() - began)
    return float(np.median(took))


def main() -> None:
    """Print a line for each kind of layer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--tokens", type=int, default=1024)
    told = parser.parse_args()
    torch.set_num_threads(1)
    loaded, _ = compressing.load("minilm", None, ["dense", "query"], [])
    for name, whole in [(n, w) for n, w in loaded.weights().items() if ".layer.3." in n]:
        weight = (whole if whole.shape[0] <= whole.shape[1] else whole.T).astype(np.float64)  # (d x n), d <= n
        d, n = weight.shape
        rank = int(told.keep * d * n / (d + n))
        u, values, vt = np.linalg.svd(weight, full_matrices=False)
        low = error(weight, u[:, :rank] * values[:rank] @ vt[:rank])
        atoms, codes = dictionary(weight, told.keep)
        x = torch.randn(d, told.tokens, requires_grad=True)  # y = S^T (D^T x)
        down = torch.tensor(atoms.T, dtype=torch.float32)
        sparse = torch.tensor(codes.T, dtype=torch.float32).to_sparse_csr()
        thin = torch.tensor((u[:, :rank] * values[:rank]).T, dtype=torch.float32)
        wide = torch.tensor(vt[:rank].T, dtype=torch.float32)
        slower = seconds(lambda x, a=down, b=sparse: b @ (a @ x), x) / seconds(
            lambda x, a=thin, b=wide: b @ (a @ x), x
        )
        other = error(weight, atoms @ codes)
        print(f"{name:<45} {d} x {n}  low rank {low:.3f}  dictionary {other:.3f}  time {slower:.1f}")


if __name__ == "__main__":
    main()
