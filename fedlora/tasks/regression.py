"""Regression: each text, or pair of texts, has one score or several, such as how alike two texts are.

Scores go from 0 at `data.score.low` to 1 at `data.score.high`, a scale that is public: that of the clients' own
rows would tell of them. The loss of an example is the mean over its scores of the squared error on that scale.
With sums over n rows of scores x and y, told and predicted, the correlation is (Pearson)

    (n Sxy - Sx Sy) / sqrt((n Sxx - Sx^2) (n Syy - Sy^2)),

of several scores its mean; 0 where all of either are the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data.cells import NO_SCALE
from fedlora.data.reading import Rows
from fedlora.data.store import Encoded
from fedlora.data.targets import scores
from fedlora.tasks.classification import Classification, inputs
from fedlora.tasks.contract import Batch, Problem, Sums

if TYPE_CHECKING:
    import torch

_CONSTANT = 1e-10  # of a variance, relative to the mean of squares: what rounding leaves of none


class Regression(Classification):
    """Scores of a text, or of a pair of texts: squared error, Pearson's correlation, mean absolute error."""

    metric = "pearson"
    target = "score"
    problem = "regression"

    @classmethod
    def needs(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        """Columns of scores, and their scale."""
        yield from super().needs(sections)
        data = sections.get("data")
        if data and data.score is None:
            yield ("data", "score"), NO_SCALE
        if data and data.labels is not None:
            yield ("data", "labels"), "scores are called by their columns: leave it out"

    @classmethod
    def begins(cls, labels: Sequence[str]) -> float:
        """The middle of the scale."""
        return 0.5

    @classmethod
    def encode(cls, reader: Any, rows: Rows, labels: Sequence[str], max_length: int) -> Encoded:
        """Each text, or pair of texts, cut to `max_length` tokens; the targets are its scores, from 0 to 1."""
        tokens, types = cls.cut(reader, rows, max_length)
        return Encoded(tokens, scores(rows, labels), types)

    @classmethod
    def answer(
        cls, model: Any, reader: Any, text: str, labels: Sequence[str], max_length: int, max_new_tokens: int
    ) -> tuple[str, float | None]:
        """The score in its units; of several each with its name."""
        low, high = _scale(model.config)
        found = [low + (high - low) * float(x) for x in model(**inputs(model, reader, text, max_length)).logits[0]]
        if len(found) == 1:
            return f"{found[0]:.3f}", None
        return ", ".join(f"{name} {score:.3f}" for name, score in zip(labels, found, strict=True)), None

    def losses(self, batch: Batch) -> "torch.Tensor":
        """Mean squared error of each example, (examples,)."""
        return (self.logits(batch) - batch["targets"]).square().mean(-1)

    def score(self, batch: Batch) -> dict[str, Any]:
        """Sums over examples of the loss and of what the correlation and the error are made of, (scores,) each."""
        predicted, told = self.logits(batch).double(), batch["targets"].double()
        parts = {
            "x": told,
            "y": predicted,
            "xx": told.square(),
            "yy": predicted.square(),
            "xy": told * predicted,
            "off": (told - predicted).abs(),
        }
        sums: dict[str, Any] = {name: part.sum(0).cpu().numpy() for name, part in parts.items()}
        loss = (predicted - told).square().mean(-1).sum()
        return {"loss": float(loss), "examples": float(len(told)), **sums}

    def outputs(self, batch: Batch) -> NDArray[np.float32]:
        """The scores in their units, (examples, scores)."""
        return self._in_units(self.logits(batch))

    def judged_by(self, batch: Batch) -> NDArray[np.float32]:
        """The right scores in their units, (examples, scores)."""
        return self._in_units(batch["targets"])

    def _in_units(self, scores: "torch.Tensor") -> NDArray[np.float32]:
        low, high = _scale(self.model.get_base_model().config)
        made: NDArray[np.float32] = (low + (high - low) * scores.float()).cpu().numpy()
        return made

    def figures(self, sums: Sums) -> dict[str, float]:
        """Mean loss, correlation, and mean absolute error in the scores' own units."""
        n, low, high = sums["examples"], *_scale(self.model.get_base_model().config)
        shared = n * sums["xy"] - sums["x"] * sums["y"]
        spread = np.ones_like(shared)
        for of in ("x", "y"):
            own = n * sums[of + of] - sums[of] ** 2
            spread *= np.where(own > _CONSTANT * n * sums[of + of], own, 0.0)
        each = np.divide(shared, np.sqrt(spread), out=np.zeros_like(shared), where=spread > 0)
        return {
            "loss": sums["loss"] / n,
            "pearson": float(each.mean()),
            "mae": float(sums["off"].mean() / n * (high - low)),
        }


def _scale(config: Any) -> tuple[float, float]:
    """From where to where the scores of a model go."""
    low, high = getattr(config, "score_scale", (0.0, 1.0))
    return low, high
