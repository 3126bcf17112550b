"""Multi-label classification: each text, or pair of texts, has any number of a list of labels.

The loss of an example is the sum over labels of the binary cross-entropy: the negative log-likelihood of its set
of labels. Under a mean gradients would be the shorter the more labels there are, and noise as long as before: in
the sum a label's part of the gradient does not depend on how many others there are, as in cross-entropy.

A label is given from a probability on: the threshold, 0.5, or where there are rows to choose by the one of
`THRESHOLDS` of the best micro F1 on them. Figures come from counts in bins between thresholds, (labels, bins), of
labels that rows have and that they have not: counts add up, whatever the threshold.
"""

from collections.abc import Mapping, Sequence
from math import log
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data.reading import Rows
from fedlora.data.store import Encoded
from fedlora.data.targets import several
from fedlora.errors import SettingError
from fedlora.tasks.classification import Classification, inputs
from fedlora.tasks.contract import Batch, Sums

if TYPE_CHECKING:
    import torch

HALF = 0.5
THRESHOLDS = (0.01, 0.02, 0.03, 0.04, *(i / 20 for i in range(1, 20)))
"""Probabilities from which on a label may be given: finer where labels are many, and each is rare."""

TOP = 5  # labels that are the likeliest of a row


class MultiLabel(Classification):
    """The labels of a text, or of a pair of texts: binary cross-entropy, micro and macro F1, precision at 5."""

    metric = "micro_f1"
    target = "many"
    problem = "multi_label_classification"

    @classmethod
    def begins(cls, labels: Sequence[str]) -> float:
        """So that each label is as likely as one of all, as a softmax begins; zeros would give half of them."""
        return -log(len(labels) - 1)

    @classmethod
    def encode(cls, reader: Any, rows: Rows, labels: Sequence[str], max_length: int) -> Encoded:
        """Each text, or pair of texts, cut to `max_length` tokens; the targets are 1 for each of its labels."""
        tokens, types = cls.cut(reader, rows, max_length)
        return Encoded(tokens, several(rows, labels), types)

    @classmethod
    def answer(
        cls, model: Any, reader: Any, text: str, labels: Sequence[str], max_length: int, max_new_tokens: int
    ) -> tuple[str, float | None]:
        """The labels that reach the threshold, the likeliest first, each with its probability; or `none`."""
        shares = model(**inputs(model, reader, text, max_length)).logits.sigmoid()[0]
        given = shares >= getattr(model.config, "threshold", HALF)
        order = [int(i) for i in shares.argsort(descending=True) if given[i]]
        return ", ".join(f"{labels[i]} {float(shares[i]):.3f}" for i in order) or "none", None

    def losses(self, batch: Batch) -> "torch.Tensor":
        """Binary cross-entropy of each example, summed over labels, (examples,)."""
        return _entropies(self.logits(batch), batch["targets"]).sum(-1)

    def score(self, batch: Batch) -> dict[str, Any]:
        """Sums of the loss and of the examples, and counts by label and bin of labels had and not had."""
        import torch

        logits, held = self.logits(batch), batch["targets"]
        edges = torch.tensor(THRESHOLDS, device=logits.device)
        bins = torch.bucketize(logits.sigmoid(), edges, right=True)  # how many thresholds each reaches
        within = torch.nn.functional.one_hot(bins, len(THRESHOLDS) + 1)  # (examples, labels, bins)
        had = (within * held[:, :, None]).sum(0)
        top = held.gather(1, logits.topk(min(TOP, logits.shape[1])).indices)
        return {
            "loss": float(_entropies(logits, held).sum()),
            "examples": float(len(logits)),
            "had": had.cpu().numpy().astype(np.float64),
            "had_not": (within.sum(0) - had).cpu().numpy().astype(np.float64),
            "top": float(top.sum()),
        }

    def outputs(self, batch: Batch) -> NDArray[np.float32]:
        """The probability of each label by itself, (examples, labels)."""
        made: NDArray[np.float32] = self.logits(batch).sigmoid().cpu().numpy()
        return made

    def figures(self, sums: Sums) -> dict[str, float]:
        """Mean loss, and F1 at the model's threshold, 0.5 where none was chosen."""
        return figures(sums, getattr(self.model.get_base_model().config, "threshold", HALF))

    def by_half(self, sums: Mapping[Any, Sums]) -> dict[str, dict[str, float]]:
        """The same, by the threshold that those choose which choose, where there are any."""
        chosen = best_threshold(sums["validation"]) if "validation" in sums else HALF
        return {half: figures(these, chosen) for half, these in sums.items()}


def figures(sums: Sums, threshold: float) -> dict[str, float]:
    """Mean loss, and F1 over all labels together and as the mean over labels, at one of `THRESHOLDS`.

    The F1 of a label is `2 t / (g + h)`, of t rows that have it and are given it, g that are given it and h that
    have it; where there are none of either it is 0.

    Raises:
        SettingError: it is another one, as where somebody wrote it into `fedlora.json`.
    """
    if threshold not in THRESHOLDS:
        known = ", ".join(f"{one:g}" for one in THRESHOLDS)
        raise SettingError(
            "threshold", f"figures at the threshold {threshold:g} are not counted: take one of {known}"
        )
    right, given, had = (counts[:, THRESHOLDS.index(threshold)] for counts in _reached(sums))
    each = np.divide(2 * right, given + had, out=np.zeros_like(right), where=given + had > 0)
    told = {"loss": sums["loss"] / sums["examples"], "micro_f1": _micro(right, given, had)}
    told |= {"macro_f1": float(each.mean()), "threshold": threshold}
    return told | ({"precision_at_5": sums["top"] / (TOP * sums["examples"])} if len(each) > TOP else {})


def best_threshold(sums: Sums) -> float:
    """The one of `THRESHOLDS` at which micro F1 is the best; of equals the nearest to a half."""
    micro = [_micro(*at) for at in zip(*(counts.T for counts in _reached(sums)), strict=True)]
    return max(zip(micro, THRESHOLDS, strict=True), key=lambda both: (both[0], -abs(both[1] - HALF)))[1]


def _micro(right: NDArray[np.float64], given: NDArray[np.float64], had: NDArray[np.float64]) -> float:
    return float(2 * right.sum() / max(given.sum() + had.sum(), 1.0))


def _reached(sums: Sums) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Rows given a label rightly, rows given it and rows that have it, of each label and threshold."""
    had, others = (sums[key][:, ::-1].cumsum(axis=1)[:, ::-1] for key in ("had", "had_not"))
    right = had[:, 1:]
    return right, right + others[:, 1:], np.broadcast_to(had[:, :1], right.shape)


def _entropies(logits: "torch.Tensor", held: "torch.Tensor") -> "torch.Tensor":
    """Binary cross-entropy of each example and label."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    return binary_cross_entropy_with_logits(logits, held.float(), reduction="none")
