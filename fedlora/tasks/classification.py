"""Sequence classification: each text, or pair of texts, has one of a list of labels."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedlora.data.reading import Rows
from fedlora.data.store import Encoded
from fedlora.data.targets import one_each
from fedlora.tasks.base_model import filler, text_kinds
from fedlora.tasks.contract import Batch, Problem, Sums, Task

if TYPE_CHECKING:
    import torch


class Classification(Task):
    """The label of a text, or of a pair of texts: cross-entropy and accuracy."""

    task_type: str | None = "SEQ_CLS"
    metric = "accuracy"
    higher_is_better = True
    auto = "AutoModelForSequenceClassification"

    class_weights: "torch.Tensor | None" = None  # of labels, by which examples teach; None: all alike
    smoothing: float = 0.0  # share of a label that is spread over all labels

    @classmethod
    def needs(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        """A column of labels."""
        data = sections.get("data")
        if data and data.files and data.files.label is None:
            what = "scores" if cls.target == "score" else "labels"
            yield ("data", "files", "label"), f"{sections.get('task')} needs the name of the column of {what}"
        yield from no_answers(sections)

    @classmethod
    def encode(cls, reader: Any, rows: Rows, labels: Sequence[str], max_length: int) -> Encoded:
        """Each text, or pair of texts, cut to `max_length` tokens; the target is the number of its label."""
        tokens, types = cls.cut(reader, rows, max_length)
        return Encoded(tokens, one_each(rows, labels), types)

    @classmethod
    def cut(
        cls, reader: Any, rows: Rows, max_length: int
    ) -> tuple[Sequence[Sequence[int]], Sequence[Sequence[int]] | None]:
        """The tokens of each row, and of pairs which text each is of, where the tokenizer says."""
        cut = reader(rows.texts, truncation=True, max_length=max_length)
        types = cut.get("token_type_ids") or []
        return cut["input_ids"], types if any(map(any, types)) else None

    @classmethod
    def answer(
        cls, model: Any, reader: Any, text: str, labels: Sequence[str], max_length: int, max_new_tokens: int
    ) -> tuple[str, float | None]:
        """The likeliest label, and its probability."""
        return likeliest(model, inputs(model, reader, text, max_length), labels)

    def logits(self, batch: Batch) -> "torch.Tensor":
        """Of each example, (examples, labels)."""
        out = self._run(batch)
        logits: torch.Tensor = out.logits.float()
        return logits

    def weigh(self, weights: Sequence[float] | None, smoothing: float) -> None:
        """Let examples teach by weights of their labels, in order, and by labels that are smoothed."""
        import torch

        self.smoothing = smoothing
        self.class_weights = None if weights is None else torch.tensor(weights, device=self.device)

    def losses(self, batch: Batch) -> "torch.Tensor":
        """Cross-entropy of each example times the weight of its own label, (examples,).

        A weight depends on the example's label alone, and nothing is divided by the weights of others.
        """
        from torch.nn.functional import cross_entropy

        targets = batch["targets"]
        each = cross_entropy(self.logits(batch), targets, reduction="none", label_smoothing=self.smoothing)
        return each if self.class_weights is None else each * self.class_weights[targets]

    def score(self, batch: Batch) -> dict[str, float]:
        """Sums of the loss, of the correct answers and of the examples."""
        from torch.nn.functional import cross_entropy

        logits = self.logits(batch)
        return {
            "loss": float(cross_entropy(logits, batch["targets"], reduction="sum")),
            "correct": float((logits.argmax(-1) == batch["targets"]).sum()),
            "examples": float(len(logits)),
        }

    def figures(self, sums: Sums) -> dict[str, float]:
        """Mean loss and accuracy."""
        return {"loss": sums["loss"] / sums["examples"], "accuracy": sums["correct"] / sums["examples"]}


def inputs(model: Any, reader: Any, text: str, max_length: int) -> dict[str, Any]:
    """What a finished model takes of one text."""
    import torch

    cut = reader(text, truncation=True, max_length=max_length)
    if not len(cut["input_ids"]):
        cut = {"input_ids": [filler(reader)], "attention_mask": [1], "token_type_ids": [0]}
    known = ("input_ids", "attention_mask", *(["token_type_ids"] if text_kinds(model) > 1 else []))
    return {key: torch.tensor([cut[key]]) for key in known if key in cut}


def likeliest(model: Any, batch: Mapping[str, Any], labels: Sequence[str]) -> tuple[str, float]:
    """The label that a classifier finds likeliest for one example, and its probability."""
    shares = model(**batch).logits.softmax(-1)[0]
    best = int(shares.argmax())
    return labels[best], float(shares[best])


def no_answers(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """What asks for answers that a task does not write."""
    if sections.get("exact_match"):
        yield ("exact_match",), "a classifier writes no answers: drop it, or use task: causal_lm"
