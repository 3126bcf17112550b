"""Clients one after another in this process: for small work, debugging and notebooks."""

from collections.abc import Sequence
from pathlib import Path

from fedlora.adapter import Adapter, Instruction
from fedlora.engine.base import EVALUATION_CHUNK, Engine, chunks
from fedlora.engine.worker import Description, Replies, Setup, Worker


class InlineEngine(Engine):
    """One worker, in this process."""

    def start(self, setup: Setup) -> Description:
        """Load the model here."""
        self.worker = Worker(setup)
        self.description = self.worker.describe()
        return self.description

    def train(self, instruction: Instruction, cohort: Sequence[int], partial_sums: bool) -> Replies:
        """Run the clients in order, in the chunks that other engines make."""
        parts = [self.worker.train(instruction, chunk, partial_sums) for chunk in chunks(cohort)]
        return Replies([u for p in parts for u in p.updates], [r for p in parts for r in p.reports])

    def evaluate(self, adapter: Adapter) -> dict[str, float]:
        """Loss and metric on the test set."""
        sums: dict[str, float] = {}
        for start in range(0, self.description.test_examples, EVALUATION_CHUNK):
            stop = min(start + EVALUATION_CHUNK, self.description.test_examples)
            for key, value in self.worker.evaluate(adapter, start, stop).items():
                sums[key] = sums.get(key, 0.0) + value
        return self.worker.figures(sums)

    def export(self, adapter: Adapter, folder: Path) -> None:
        """Write the adapter."""
        self.worker.export(adapter, folder)

    def close(self) -> None:
        """Nothing to let go."""
