"""What evaluation beside the next round saves, where clients do not go up in the workers.

    python benchmarks/beside.py [--pairs 2] [--set "data.files={train: a.tsv, text: sentence, label: label}"]

Three clients of `paper/sst2_minilm` on two workers of Ray, each of six rounds evaluated; runs take turns.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from fedlora import simulate
from fedlora.engine import Engine
from fedlora.engine.ray import RayEngine

SETTINGS = ("rounds=6", "eval_every=1", "engine.kind=ray", "engine.workers=2")


def run(overrides: Sequence[str]) -> tuple[float, list[float]]:
    """Seconds of a steady round, and the accuracies."""
    with tempfile.TemporaryDirectory() as folder:
        lines = simulate("paper/sst2_minilm", overrides=[*SETTINGS, *overrides], out=Path(folder) / "run").rounds
    return statistics.median(line["seconds"] for line in lines[1:-1]), [line["accuracy"] for line in lines]


def main() -> None:
    """Print a line for each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--set", metavar="a.b=v", action="append", default=[], dest="overrides")
    told = parser.parse_args()
    for _ in range(told.pairs):
        seconds, accuracies = run(told.overrides)
        with patch.object(RayEngine, "beside", Engine.beside):  # what an engine does that has nobody idle
            between, same = run(told.overrides)
        assert accuracies == same
        print(
            f"beside {seconds:.2f} s a round, between rounds {between:.2f}, ratio {between / seconds:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
