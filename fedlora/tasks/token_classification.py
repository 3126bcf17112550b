"""Token classification: entities in a text, as a tag in IOB2 for each of its words.

A word is judged by the first piece that the tokenizer makes of it; the others are not scored. With n scored pieces
the loss of an example is

    L = 1/n sum_i -log p_i(tag_i)

and 0 where nothing is scored: what clipping bounds is the part of a text. Figures are of entities: one is found
where its type, its first and its last word are right (`fedlora.data.tagged`).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data import tagged
from fedlora.data.reading import Rows
from fedlora.data.store import Encoded, Examples
from fedlora.errors import SettingError
from fedlora.passes.packing import Segments
from fedlora.tasks.base_model import text_kinds
from fedlora.tasks.causal_lm import no_pairs
from fedlora.tasks.classification import no_answers
from fedlora.tasks.contract import UNSCORED, Batch, Problem, Task

if TYPE_CHECKING:
    import torch

_COUNTS = ("held", "said", "found")  # entities that there are, that the model names, and that it names rightly


class TokenClassification(Task):
    """The entities of a text: mean cross-entropy over its words, and F1 of whole entities."""

    task_type = "TOKEN_CLS"
    metric = "f1"
    higher_is_better = True
    auto = "AutoModelForTokenClassification"
    target = "marks"
    pools = False

    @classmethod
    def needs(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        """Columns of words and of tags, or of texts and of spans; a list of tags that is one."""
        data, model = sections.get("data"), sections.get("model")
        if data and data.files and data.files.label is None:
            yield ("data", "files", "label"), "token_classification needs the name of the column of tags or spans"
        if data and data.labels is not None and (wrong := tagged.wrong_names(data.labels)):
            yield ("data", "labels"), wrong
        yield from no_pairs(sections)
        yield from no_answers(sections)
        if model and model.pooler == "trained":
            yield ("model", "pooler"), "a model that judges each token has no pooler"

    @classmethod
    def encode(cls, reader: Any, rows: Rows, labels: Sequence[str], max_length: int) -> Encoded:
        """Each text, or its words joined by spaces, cut to `max_length` tokens, with a mark for each word's first.

        The target is the number of the tag that a text's first entity begins with, or of `O`: what partitions by
        label go by.

        Raises:
            SettingError: the tokenizer does not tell where its pieces lie.
        """
        texts = [row if isinstance(row, str) else [str(word) for word in row] for row in rows.texts]
        laid = [tagged.places(row) for row in texts]
        ids, pieces = _cut(reader, [text for text, _ in laid], max_length)
        number = {label: i for i, label in enumerate(labels)}
        marks, targets, short = [], [], 0
        every = [[str(tag) for tag in label] for label in rows.labels or ()]
        for tokens, lie, (text, words), tags in zip(ids, pieces, laid, every, strict=True):
            first = list(tagged.first_pieces(text, words, lie))
            mine = [UNSCORED] * len(tokens)
            for at, tag in zip(first, tags, strict=True):
                if at is not None:
                    mine[at] = number[tag]
            marks.append(mine)
            targets.append(number[next((tag for tag in tags if tag != tagged.OUTSIDE), tagged.OUTSIDE)])
            short += len(tokens) == max_length and first[-1:] == [None]
        return Encoded(ids, targets, marks=marks, cut=short)

    @classmethod
    def answer(
        cls, model: Any, reader: Any, text: str, labels: Sequence[str], max_length: int, max_new_tokens: int
    ) -> tuple[str, float | None]:
        """The entities of a text: of each its type, its characters and what stands there."""
        found = cls.entities(model, reader, text, labels, max_length)
        told = [f"{kind} {start}-{end}: {text[start:end]}" for start, end, kind in found]
        return "; ".join(told) or "no entity", None

    @classmethod
    def entities(
        cls, model: Any, reader: Any, text: str, labels: Sequence[str], max_length: int
    ) -> list[tagged.Entity]:
        """The entities that a finished model finds in a text, in characters of it; arguments as of `answer`."""
        import torch

        (ids,), (pieces,) = _cut(reader, [text], max_length)
        _, words = tagged.places(text)
        if not ids:
            return []
        begun = zip(words, tagged.first_pieces(text, words, pieces), strict=True)
        first = [(word, at) for word, at in begun if at is not None]
        whole = torch.tensor([ids])
        inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        if text_kinds(model) > 1:
            inputs["token_type_ids"] = torch.zeros_like(whole)
        best = model(**inputs).logits[0].argmax(-1).tolist()
        found = tagged.entities([labels[best[at]] for _, at in first])
        return [tagged.Entity(first[a][0][0], first[b - 1][0][1], kind) for a, b, kind in found]

    def logits(self, batch: Batch) -> "torch.Tensor":
        """Of the scored tokens, (scored tokens, labels), one example after another."""
        scored, out = batch["marks"] >= 0, self._run(batch).logits
        if self.packing is not None:  # a row, of what is no padding
            out, scored = out[0], scored[batch["attention_mask"].bool()]
        logits: torch.Tensor = out[scored].float()
        return logits

    def losses(self, batch: Batch) -> "torch.Tensor":
        """Mean cross-entropy over the scored tokens of each example, (examples,)."""
        return self._losses(self.logits(batch), batch["marks"])

    def _losses(self, logits: "torch.Tensor", marks: "torch.Tensor") -> "torch.Tensor":
        from torch.nn.functional import cross_entropy

        scored = marks >= 0
        each = Segments(scored).batch(cross_entropy(logits, marks[scored], reduction="none")[None])
        return each.sum(-1) / scored.sum(-1).clamp(min=1)

    def judged_by(self, batch: Batch) -> NDArray[Any]:
        """The number of the tag of each scored token, in the order of `logits`."""
        marks = batch["marks"]
        made: NDArray[Any] = marks[marks >= 0].cpu().numpy()
        return made

    @property
    def tags(self) -> list[str]:
        """In order."""
        named = self.model.get_base_model().config.id2label
        return [str(named[i]) for i in range(len(named))]

    def score(self, batch: Batch) -> dict[str, float]:
        """Sums of the loss, of examples, tokens and tokens that are right, and of entities by type and rule."""
        logits, right, tags = self.logits(batch), self.judged_by(batch), self.tags
        said = logits.argmax(-1).cpu().numpy()
        sums = {
            "loss": float(self._losses(logits, batch["marks"]).sum()),
            "examples": float(len(batch["marks"])),
            "tokens": float(len(right)),
            "right": float((said == right).sum()),
        }
        ends = np.cumsum((batch["marks"] >= 0).sum(-1).cpu().numpy())[:-1]
        sequences = [([tags[i] for i in one] for one in np.split(numbers, ends)) for numbers in (right, said)]
        return sums | count(tags, zip(*sequences, strict=True))

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean loss of an example; F1, precision and recall over all entities, and F1 of each type.

        `f1_strict` is F1 by IOB2 to the letter; `token_accuracy` is that of tags.
        """
        types = sorted(key.removeprefix("held/") for key in sums if key.startswith("held/"))
        held, said, found = ({kind: sums[f"{what}/{kind}"] for kind in types} for what in _COUNTS)
        whole = [sum(counts.values()) for counts in (held, said, found)]
        strict = [sum(sums[f"{what}_strict/{kind}"] for kind in types) for what in _COUNTS]
        return {
            "loss": sums["loss"] / sums["examples"],
            "f1": _f1(*whole),
            "precision": _share(whole[2], whole[1]),
            "recall": _share(whole[2], whole[0]),
            "f1_strict": _f1(*strict),
            "token_accuracy": _share(sums["right"], sums["tokens"]),
            **{f"f1/{kind}": _f1(held[kind], said[kind], found[kind]) for kind in types},
        }

    def samples(self, max_length: int, special: Collection[int]) -> Examples:
        """As of every task; of three tokens two are scored, by all tags in turn."""
        made = super().samples(max_length, special)
        at = np.arange(len(made.tokens), dtype=np.int32)
        return replace(made, marks=np.where(at % 3 == 2, UNSCORED, at % len(self.tags)).astype(np.int32))


def count(tags: Collection[str], sequences: Iterable[tuple[Sequence[str], Sequence[str]]]) -> dict[str, float]:
    """Entities of each type that there are (`held`), that are said, and that are found: said as they are.

    Args:
        tags: that there may be.
        sequences: of each example its tags, and those that are said.

    Returns:
        Counts such as `found/X` and, by the strict rule, `found_strict/X`; all types of `tags` have theirs.
    """
    types = {tag[2:] for tag in tags if tag != tagged.OUTSIDE}
    rules = {"": False, "_strict": True}
    counts = {f"{what}{rule}/{kind}": 0.0 for kind in sorted(types) for rule in rules for what in _COUNTS}
    for right, said in sequences:
        for rule, strict in rules.items():
            there, named = (set(tagged.entities(one, strict)) for one in (right, said))
            for what, some in zip(_COUNTS, (there, named, there & named), strict=True):
                for entity in some:
                    counts[f"{what}{rule}/{entity.type}"] += 1
    return counts


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _f1(held: float, said: float, found: float) -> float:
    """The harmonic mean of precision and recall: `2 found / (held + said)`."""
    return _share(2 * found, held + said)


def _cut(reader: Any, texts: list[str], max_length: int) -> tuple[list[list[int]], list[list[tagged.Place]]]:
    """The tokens of texts, and where each lies in its text.

    Raises:
        SettingError: the tokenizer does not tell.
    """
    if not getattr(reader, "is_fast", False):
        raise SettingError(
            "model.base",
            "its tokenizer does not tell where its pieces lie in a text: take a model with a tokenizer.json",
        )
    cut = reader(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
    return cut["input_ids"], cut["offset_mapping"]
