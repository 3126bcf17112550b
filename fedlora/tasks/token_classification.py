"""Token classification: entities in a text, as a tag in IOB2 for each of its words.

A word is judged by the first piece that the tokenizer makes of it; the others are not scored. With n scored pieces
the loss of an example is

    L = 1/n sum_i -log p_i(tag_i)

and 0 where nothing is scored, over all windows of a longer text (`fedlora.tasks.windows`): what clipping bounds is
the part of a text. Figures are of entities: one is found
where its type, its first and its last word are right (`fedlora.data.tagged`).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data import tagged
from fedlora.data.reading import Rows
from fedlora.data.store import Encoded, Examples
from fedlora.passes.packing import Segments
from fedlora.tasks import windows
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
        """Each text, or its words joined by spaces, in windows of at most `max_length` tokens (`windows`).

        Each word's first token has a mark. The target is the number of the tag that a text's first entity begins
        with, or of `O`: what partitions by label go by.

        Raises:
            SettingError: the tokenizer does not say where its pieces lie.
        """
        texts = [row if isinstance(row, str) else [str(word) for word in row] for row in rows.texts]
        laid = [tagged.places(row) for row in texts]
        number = {label: i for i, label in enumerate(labels)}
        tokens, marks, types, targets = [], [], [], []
        every = [[str(tag) for tag in label] for label in rows.labels or ()]
        cut = windows.cut(reader, [text for text, _ in laid], max_length)
        for sequences, (text, words), tags in zip(cut, laid, every, strict=True):
            mine = [[UNSCORED] * len(one.ids) for one in sequences]
            for place, tag in zip(windows.first_pieces(text, words, sequences), tags, strict=True):
                if place is not None:
                    mine[place[0]][place[1]] = number[tag]
            tokens.append([token for one in sequences for token in one.ids])
            marks.append([mark for one in mine for mark in one])
            types.append([at % 2 for at, one in enumerate(sequences) for _ in one.ids])
            targets.append(number[next((tag for tag in tags if tag != tagged.OUTSIDE), tagged.OUTSIDE)])
        several = any(len(sequences) > 1 for sequences in cut)
        return Encoded(tokens, targets, types=types if several else None, marks=marks)

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
        (sequences,) = windows.cut(reader, [text], max_length)
        _, words = tagged.places(text)
        begun = zip(words, windows.first_pieces(text, words, sequences), strict=True)
        first = [(word, at) for word, at in begun if at is not None]
        best = [_best(model, one.ids) for one in sequences]
        found = tagged.entities([labels[best[number][at]] for _, (number, at) in first])
        return [tagged.Entity(first[a][0][0], first[b - 1][0][1], kind) for a, b, kind in found]

    def batch(self, examples: Examples, rows: NDArray[np.int64]) -> Batch:
        """As of every task, with as many sequences for each example as the longest text has windows.

        `prefix` only where all texts have as many.
        """
        if examples.types is None:
            return super().batch(examples, rows)
        each = [
            [*zip(*(windows.parted(part, examples.types_of(row)) for part in parts), strict=True)]
            for row in map(int, rows)
            for parts in [(examples.row(row), examples.marks_of(row))]
        ]
        most = max(map(len, each))
        none = (np.array([self.pad]), np.array([UNSCORED]))
        whole = [one for held in each for one in (*held, *[none] * (most - len(held)))]
        ids = np.full((len(whole), max(len(tokens) for tokens, _ in whole)), self.pad, np.int64)
        mask, marks = np.zeros_like(ids), np.full_like(ids, UNSCORED)
        for i, (tokens, mine) in enumerate(whole):
            ids[i, : len(tokens)], mask[i, : len(tokens)], marks[i, : len(tokens)] = tokens, 1, mine
        arrays = {"input_ids": ids, "attention_mask": mask, "targets": examples.targets[rows], "marks": marks}
        if any(len(held) < most for held in each):
            return {key: self.place(array) for key, array in arrays.items()}
        return self._placed(examples, rows, arrays)

    def join(self, batches: Sequence[Batch]) -> Batch:
        """As of every task; examples of other batches may have more windows."""
        counts = [len(batch["input_ids"]) // len(batch["targets"]) for batch in batches]
        most, joined = max(counts), []
        for batch, count in zip(batches, counts, strict=True):
            if count < most:
                fillers = {"input_ids": (self.pad,) * 2, "attention_mask": (0, 1), "marks": (UNSCORED,) * 2}
                batch = {"targets": batch["targets"]} | {
                    key: windows.grown(batch[key], len(batch["targets"]), most, *told)
                    for key, told in fillers.items()
                }
            joined.append(batch)
        return super().join(joined)

    def sequences(self, examples: Examples, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The windows of each text."""
        if examples.types is None:
            return super().sequences(examples, rows)
        return np.array([1 + np.count_nonzero(np.diff(examples.types_of(int(row)))) for row in rows], np.int64)

    def below(self, examples: Examples, rows: NDArray[np.int64], half: bool) -> "torch.Tensor":
        """As of every task, of texts with as many windows together: what fills others up is no example's."""
        import torch

        counts = self.sequences(examples, rows)
        groups = np.split(rows, np.flatnonzero(np.diff(counts)) + 1)
        return torch.cat([super(TokenClassification, self).below(examples, group, half) for group in groups], 1)

    def logits(self, batch: Batch) -> "torch.Tensor":
        """Of the scored tokens, (scored tokens, labels), one example after another."""
        scored, out = batch["marks"] >= 0, self._run(batch).logits
        if self.packing is not None:  # a row, of what is no padding
            out, scored = out[0], scored[batch["attention_mask"].bool()]
        logits: torch.Tensor = out[scored].float()
        return logits

    def losses(self, batch: Batch) -> "torch.Tensor":
        """Mean cross-entropy over the scored tokens of each example, (examples,)."""
        return self._losses(self.logits(batch), batch["marks"], len(batch["targets"]))

    def _losses(self, logits: "torch.Tensor", marks: "torch.Tensor", examples: int) -> "torch.Tensor":
        from torch.nn.functional import cross_entropy

        scored = marks >= 0  # (sequences of all, longest)
        each = Segments(scored).batch(cross_entropy(logits, marks[scored], reduction="none")[None])
        whole, count = (part.sum(-1).view(examples, -1).sum(-1) for part in (each, scored))
        return whole / count.clamp(min=1)

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
        said, examples = logits.argmax(-1).cpu().numpy(), len(batch["targets"])
        sums = {
            "loss": float(self._losses(logits, batch["marks"], examples).sum()),
            "examples": float(examples),
            "tokens": float(len(right)),
            "right": float((said == right).sum()),
        }
        ends = np.cumsum((batch["marks"] >= 0).view(examples, -1).sum(-1).cpu().numpy())[:-1]
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
        """As of every task; of three tokens two are scored, by all tags in turn.

        Of every two texts one has two windows, its own tokens and those of the text before backwards.
        """
        made = super().samples(max_length, special)
        each = [made.row(i) for i in range(len(made))]
        parts = [[one, each[i - 1][::-1]] if i % 2 else [one] for i, one in enumerate(each)]
        tokens = np.concatenate([one for held in parts for one in held])
        types = np.concatenate([np.full(len(one), at, np.uint8) for held in parts for at, one in enumerate(held)])
        at = np.arange(len(tokens), dtype=np.int32)
        marks = np.where(at % 3 == 2, UNSCORED, at % len(self.tags)).astype(np.int32)
        ends = np.cumsum([0, *(sum(map(len, held)) for held in parts)])
        return Examples(tokens, ends, made.targets, types, marks)


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


def _best(model: Any, ids: list[int]) -> list[int]:
    """The number of the likeliest tag of each token of a sequence."""
    import torch

    if not ids:
        return []
    whole = torch.tensor([ids])
    inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    if text_kinds(model) > 1:
        inputs["token_type_ids"] = torch.zeros_like(whole)
    found: list[int] = model(**inputs).logits[0].argmax(-1).tolist()
    return found
