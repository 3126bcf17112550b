"""Clients one after another in this process: for small work, debugging and notebooks."""

from collections.abc import Sequence
from pathlib import Path

from fedlora.adapter import Adapter, Change, Instruction
from fedlora.engine.base import Engine, Figures, by_half, chunks, gathered, named, pieces
from fedlora.engine.replies import Replies
from fedlora.engine.setup import Description, Setup
from fedlora.engine.worker import Worker
from fedlora.passes.kept import Piece


class InlineEngine(Engine):
    """One worker, in this process."""

    def start(self, setup: Setup) -> Description:
        """Load the model here."""
        self.worker = Worker(setup)
        self.description = self.worker.describe()
        self.keep(self._fill)
        return self.description

    def _fill(self, to: Path, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self.worker.fill(to, piece)

    def train(self, instruction: Instruction, cohort: Sequence[int], partial_sums: bool) -> Replies:
        """Run the clients in order, in the chunks that other engines make."""
        groups = chunks(cohort, fused=self.worker.scenario.engine.fused)
        parts = (self.worker.train(instruction, group, partial_sums) for group in groups)
        return gathered(parts, partial_sums)

    def evaluate(self, adapter: Adapter) -> Figures:
        """Loss and metrics on the server's own rows."""
        parts = (self.worker.evaluate(adapter, *piece) for piece in pieces(self.description))
        return named(self.worker.figures(by_half(self.description, parts)))

    def judge(self, instruction: Instruction, cohort: Sequence[int], test: bool = False) -> dict[int, Figures]:
        """Loss and metrics of clients' own models."""
        return self.worker.judge(instruction, cohort, test)

    def merge(self, change: Change) -> None:
        """Fold a change into the base."""
        self.worker.merge(change)

    def export(self, adapter: Adapter, folder: Path, merged: Change | None = None) -> None:
        """Write the adapter."""
        self.worker.export(adapter, folder, merged)

    def close(self) -> None:
        """Nothing to let go."""
