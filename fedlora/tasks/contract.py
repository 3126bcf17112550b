"""The Task contract: what is learnt, and what one example's loss and figures are.

A task is one file: which columns its rows have, how they are encoded, the loss of an example, the figures it is
judged by, and how an answer is shown. It is found by its name, like a strategy, or as `module:Class`.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedlora import plugins
from fedlora.data.chats import Turn
from fedlora.data.reading import Rows
from fedlora.data.store import Encoded, Examples
from fedlora.kinds.contract import Kind
from fedlora.metrics.contract import Evaluation, Target
from fedlora.passes.prefix import Prefix, below
from fedlora.seeding import generator
from fedlora.tasks import base_model, windows
from fedlora.tasks.adapted import Adapted

if TYPE_CHECKING:
    import torch

Batch = dict[str, "torch.Tensor"]
Sums = Mapping[str, Any]
"""Numbers and float64 arrays by name, which add up over batches."""

TaskTarget = Target | Literal["start", "pair"]
"""What an example is judged by: as metrics have it, or in words that none is of."""

Problem = tuple[tuple[str, ...], str]
"""A key of a scenario, and what is wrong with it."""

Prompt = str | tuple[Turn, ...]
"""What a model goes on with: a text, or a chat whose last turn is the user's."""

UNSCORED = -100
"""The mark of a token by which nothing is judged."""

_EVALUATION_TOKENS = 1024  # padded tokens of an evaluation batch: small enough for a core's cache
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")  # of a model
_SHORT = (2, 5, 13)  # tokens of examples of the check at load, beside the longest and one of half its length
_FEW = 256  # tokens: of longer examples only the longest and the short ones pass
_SCORED = 8  # tokens of a text whose logits are looked at


class Task(Adapted, ABC):
    """What is learnt by a resident model: rows, encoding, loss and figures.

    Attributes:
        pad: the id of the padding token.
        kinds: of texts that the model tells apart by `token_type_ids`; 0 where it knows none.
        trial: the examples of the check at load (`fedlora.passes.alone`).
        mixed: why a layer mixes the examples of a pass; empty where none does.
        prefix: the layers below the lowest factors; None where there are none.
    """

    metric: ClassVar[str]
    """The name of the figure that `evaluate` is about."""

    higher_is_better: ClassVar[bool]
    """Whether more of it is better."""

    auto: ClassVar[str]
    """The class of transformers whose models learn it, such as `AutoModelForCausalLM`."""

    headed: ClassVar[bool] = True
    """Whether what a model has beside its body is a head of its own, which federates."""

    labelled: ClassVar[bool] = True
    """Whether what the head puts out has names: of labels, or of scores."""

    problem: ClassVar[str | None] = None
    """What transformers calls it, as `problem_type` of a model's configuration; None: by the number of labels."""

    target: ClassVar[TaskTarget] = "class"
    """What an example is judged by: the number of its class, any number of labels, scores, a tag of each token,
    its tokens from where its answer starts, or which of two answers is the better one. `fedlora.metrics.contract`
    says what metrics are given of each."""

    pools: ClassVar[bool] = True
    """Whether the head reads a padded batch, and not each token by itself."""

    tokens: ClassVar[bool] = True
    """Whether examples are tokens, which a tokenizer makes and which can lie in one row without padding."""

    completes: ClassVar[bool] = False
    """Whether a model goes on with what it is given (`complete`)."""

    against_base: ClassVar[bool] = False
    """Whether a loss depends on what the base makes of the same rows without its adapter."""

    trial: Examples

    def __init__(self, model: Any, kind: Kind, *, pad: int = 0, **told: Any) -> None:
        """As `Adapted`; `fedlora.tasks.loading.build` then sees how its examples can share a pass.

        Args:
            model: a transformers model in float32.
            kind: of the adapter to build in.
            pad: the id of the padding token.
            told: as `Adapted` takes it.
        """
        self.pad, self.kinds, self.mixed = pad, base_model.text_kinds(model), ""
        self.prefix: Prefix | None = None
        self._passed: tuple[Batch, Any] | None = None  # a batch, and what the model made of it
        super().__init__(model, kind, **told)

    # What is asked before there is a model.

    @classmethod
    def begins(cls, labels: Sequence[str]) -> float:
        """The bias that a head which nobody trained begins with; 0 unless a task knows better without any row."""
        return 0.0

    @classmethod
    def needs(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        """What of a scenario does not go with the task, such as a column that its rows need; imports no torch.

        Args:
            sections: of the scenario by name, those that are right by themselves.
        """
        yield from ()

    @classmethod
    def reader(cls, base: str, revision: str | None) -> Any:
        """What makes inputs of rows: the base model's tokenizer.

        Raises:
            SettingError: it cannot be loaded.
        """
        return base_model.load_tokenizer(base, revision)

    @classmethod
    @abstractmethod
    def encode(cls, reader: Any, rows: Rows, labels: Sequence[str], max_length: int) -> Encoded:
        """Rows as arrays.

        Args:
            reader: as `reader` gives it.
            rows: of one split.
            labels: in order; the target of a row is the number of its own. Empty where there are none.
            max_length: the most tokens of an example.

        Raises:
            SettingError: a row is not what the task reads.
        """

    @classmethod
    @abstractmethod
    def answer(
        cls, model: Any, reader: Any, text: str, labels: Sequence[str], max_length: int, max_new_tokens: int
    ) -> tuple[str, float | None]:
        """What a finished model makes of one input, as `fedlora predict` shows it.

        Args:
            model: a `peft.PeftModel` in evaluation.
            reader: as `reader` gives it.
            text: to judge or to go on with; for images a file.
            labels: of the run.
            max_length: the most tokens that are read.
            max_new_tokens: the most that are written.

        Returns:
            The answer, and its probability where the task has one.
        """

    @classmethod
    def complete(
        cls, model: Any, reader: Any, prompts: Sequence[Prompt], max_length: int, **how: Any
    ) -> list[str]:
        """What a finished model writes after each prompt; of tasks that write. Arguments are as of `answer`.

        `how` has `max_new_tokens`, and may have `temperature`, `top_p` and `seed`.
        """
        raise NotImplementedError

    def sees(self, reader: Any) -> None:
        """Take on what a pass needs of what `reader` gave; nothing by default."""

    # What a pass is made of.

    @abstractmethod
    def logits(self, batch: Batch) -> "torch.Tensor":
        """What losses are made of, float32: (examples, labels), or (scored tokens, vocabulary).

        A batch may have several sequences for each example, as many for all and one after another: they do not see
        each other, and their gradient is one.
        """

    @abstractmethod
    def losses(self, batch: Batch) -> "torch.Tensor":
        """The loss of each example, (examples,). An example's loss depends on that example alone."""

    @abstractmethod
    def score(self, batch: Batch) -> dict[str, Any]:
        """Sums over a batch of what `figures` divides."""

    @abstractmethod
    def figures(self, sums: Sums) -> dict[str, float]:
        """`loss` and the metric, and whatever else is to be reported, from sums over all batches."""

    def by_half(self, sums: Mapping[Any, Sums]) -> dict[str, dict[str, float]]:
        """The figures of the rows that report, `test`, and of those that choose, `validation`, if there are any.

        Args:
            sums: of each.
        """
        return {half: self.figures(these) for half, these in sums.items()}

    def outputs(self, batch: Batch) -> NDArray[np.float32]:
        """What metrics are of, where a scenario names some (`fedlora.metrics.contract`), float32.

        Of each example its outputs, (examples, width): by default the probability of each label. For `marks` those
        of each scored token, (scored tokens, width), in the order in which `judged_by` has them.
        """
        made: NDArray[np.float32] = self.logits(batch).softmax(-1).cpu().numpy()
        return made

    def judged_by(self, batch: Batch) -> NDArray[Any]:
        """What is right of each row of `outputs`; by default the targets."""
        made: NDArray[Any] = batch["targets"].cpu().numpy()
        return made

    def written(self, reader: Any, examples: Examples, rows: NDArray[np.int64], asked: Any) -> dict[str, float]:
        """Further sums for `figures`, from what the model writes where it is asked; none by default.

        Args:
            reader: gives what `reader` gives.
            examples: of the test set.
            rows: those of this call.
            asked: the scenario's `exact_match`.
        """
        return {}

    def run(self, batch: Batch, **told: Any) -> Any:
        """What the model makes of a batch, asked for more than losses need, such as `output_hidden_states`."""
        return self._pass(batch, **told)

    def _run(self, batch: Batch, **told: Any) -> Any:
        """What the model makes of a batch."""
        if self._passed is None or self._passed[0] is not batch:
            return self._pass(batch, **told)
        if self._passed[1] is None:
            self._passed = (batch, self._pass(batch, **told))
        return self._passed[1]

    def _pass(self, batch: Batch, **told: Any) -> Any:
        inputs = {key: batch[key] for key in _INPUTS if key in batch}
        self.low_rank.examples = count = len(batch["targets"])
        self.low_rank.sequences = sequences = len(next(iter(inputs.values()))) // count if inputs else 1
        if self.packing is not None:
            self.packing.sequences = sequences
        if self.prefix is None:
            return self.model(**inputs, **told)
        self.prefix.row = batch.get("prefix")
        try:
            return self.model(**inputs, **told)
        finally:
            self.prefix.row = None  # what writes answers calls the model by itself

    def micro_batches(
        self, examples: Examples, rows: NDArray[np.int64], size: int
    ) -> Iterator[tuple[Batch, NDArray[np.int64]]]:
        """`rows` in equal batches of about `size`, like lengths together so that little is padding.

        A Poisson batch is often a few more than expected: that is one pass and not two.
        """
        order = rows[np.argsort(examples.lengths(rows), kind="stable")]
        for part in windows.pieces(self.sequences(examples, order), size):
            yield self.batch(examples, order[part]), order[part]

    def sequences(self, examples: Examples, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many sequences the model sees of each example, (examples,)."""
        return np.ones(len(rows), np.int64)

    def batch(self, examples: Examples, rows: NDArray[np.int64]) -> Batch:
        """`input_ids` and `attention_mask` (examples, longest), `targets` (examples, ...), on the device.

        Of pairs `token_type_ids` too, where the model tells their texts apart; of examples whose tokens are judged
        `marks`, (examples, longest), -100 where one is not; of examples that are known above the frozen layers
        `prefix`, (1, tokens, width).
        """
        width = int(examples.lengths(rows).max())
        ids = np.full((len(rows), width), self.pad, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        types = np.zeros_like(mask) if examples.types is not None and self.kinds > 1 else None
        marks = np.full_like(mask, UNSCORED) if examples.marks is not None else None
        for i, row in enumerate(rows):
            tokens = examples.row(int(row))
            ids[i, : len(tokens)] = tokens
            mask[i, : len(tokens)] = 1
            if types is not None:
                types[i, : len(tokens)] = examples.types_of(int(row))
            if marks is not None:
                marks[i, : len(tokens)] = examples.marks_of(int(row))
        arrays = {"input_ids": ids, "attention_mask": mask, "targets": examples.targets[rows]}
        if types is not None:
            arrays["token_type_ids"] = types
        if marks is not None:
            arrays["marks"] = marks
        return self._placed(examples, rows, arrays)

    def _placed(self, examples: Examples, rows: NDArray[np.int64], arrays: Mapping[str, NDArray[Any]]) -> Batch:
        """Arrays on the device, and `prefix` where it is known of these rows; bfloat16 is kept as its bits."""
        import torch

        batch = {key: self.place(array) for key, array in arrays.items()}
        row = self.prefix.find(examples, rows) if self.prefix is not None else None
        if row is not None and (row.dtype == np.uint16) is self._in_half:
            placed = self.place(row)[None]
            batch["prefix"] = placed.view(torch.bfloat16) if row.dtype == np.uint16 else placed
        return batch

    def join(self, batches: Sequence[Batch]) -> Batch:
        """Batches as one, of their examples one after another."""
        import torch

        shared = [key for key in batches[0] if all(key in batch for batch in batches)]
        width = max(batch["input_ids"].shape[1] for batch in batches) if "input_ids" in shared else 0
        joined: Batch = {}
        fillers = {"input_ids": self.pad, "attention_mask": 0, "token_type_ids": 0, "marks": UNSCORED}
        for key in shared:
            parts = [batch[key] for batch in batches]
            if key in fillers:
                pad = torch.nn.functional.pad
                parts = [pad(part, (0, width - part.shape[1]), value=fillers[key]) for part in parts]
            joined[key] = torch.cat(parts, dim=1 if key == "prefix" else 0)
        return joined

    def evaluate(
        self, adapter: Mapping[str, NDArray[np.float32]], examples: Examples, rows: NDArray[np.int64]
    ) -> dict[str, Any]:
        """Sums of the metric over some rows, in float32."""
        return dict(self.evaluation(adapter, examples, rows).sums)

    def evaluation(
        self,
        adapter: Mapping[str, NDArray[np.float32]],
        examples: Examples,
        rows: NDArray[np.int64],
        rowwise: bool = False,
    ) -> Evaluation:
        """The same, from one pass, with what metrics are of: outputs and what is right, in the order of the rows.

        Args:
            adapter: to evaluate.
            examples: of a dataset.
            rows: the numbers of some.
            rowwise: whether outputs and targets are to be collected; those of `marks` stay as the pass had them.
        """
        import torch

        self.begin(adapter, ())
        self._use_half(False)
        self.model.eval()
        left = rows[order := np.argsort(examples.lengths(rows), kind="stable")]
        sums: dict[str, Any] = {}
        made: list[tuple[NDArray[np.float32], NDArray[Any]]] = []
        with torch.inference_mode():
            while len(left):
                chunk = left[-self.at_once(int(examples.lengths(left[-1:])[0])) :]
                batch = self.batch(examples, chunk)
                with self._once(batch):
                    for key, value in self.score(batch).items():
                        sums[key] = sums.get(key, 0.0) + value
                    if rowwise:
                        made.append((self.outputs(batch), self.judged_by(batch)))
                left = left[: -len(chunk)]
        if not made:
            return Evaluation(sums)
        outputs, targets = (np.concatenate(parts[::-1]) for parts in zip(*made, strict=True))
        if self.target != "marks":
            back = np.argsort(order, kind="stable")
            outputs, targets = outputs[back], targets[back]
        return Evaluation(sums, outputs, targets)

    @contextlib.contextmanager
    def _once(self, batch: Batch) -> Iterator[None]:
        """Let a batch pass the model once, however often something is made of it."""
        self._passed = (batch, None)
        try:
            yield
        finally:
            self._passed = None

    def at_once(self, longest: int) -> int:
        """Examples of a batch of evaluation, of which the longest has so many tokens."""
        return max(1, _EVALUATION_TOKENS // longest)

    def below(self, examples: Examples, rows: NDArray[np.int64], half: bool) -> "torch.Tensor":
        """What enters the lowest layer with factors, (1, tokens, width), of examples one after another.

        Args:
            examples: of a dataset.
            rows: to pass together.
            half: in bfloat16, and not in float32.
        """
        import torch

        assert self.prefix is not None
        before = self._in_half
        try:
            with torch.no_grad(), self.precisely(half):
                return self.prefix.come(lambda: self.logits(self.batch(examples, rows)))
        finally:
            self._use_half(before)

    def lower(self) -> Prefix | None:
        """The layers below the lowest factors, if there are any and the model packs."""
        name, body = base_model.body_of(self.model.get_base_model())
        blocks = below(body, f"{name}.", list(self._layers)) if self.packing else []
        return Prefix(blocks) if blocks else None

    def samples(self, max_length: int, special: Collection[int]) -> Examples:
        """Random examples for the check at load, the shortest first; of a decoder the last tokens are scored.

        Args:
            max_length: the most tokens of an example.
            special: ids of tokens that no text holds.
        """
        base = self.model.get_base_model()
        table, config = base.get_input_embeddings(), base.config.get_text_config()
        room = (getattr(config, "max_position_embeddings", None) or max_length + 1) - (table.padding_idx or 0) - 1
        longest = min(max_length, room) if room > 1 else max_length
        some = (*_SHORT, -(-longest // 2), longest) if longest <= _FEW else (*_SHORT, longest)
        lengths = sorted({max(2, min(n, longest)) for n in some})
        named = {i for key, i in config.to_dict().items() if key.endswith("token_id") and isinstance(i, int)}
        numbers = np.setdiff1d(np.arange(table.num_embeddings), [*special, *named])
        tokens = np.resize(generator(0, "check").permutation(numbers), sum(lengths)).astype(np.int32)
        ends = np.cumsum(lengths)
        if base.config.is_encoder_decoder and config.eos_token_id is not None:
            tokens[ends - 1] = config.eos_token_id  # such models pool there
        targets = np.zeros(len(lengths), np.int64) if self.pools else np.maximum(np.array(lengths) - _SCORED, 0)
        halves = np.concatenate([np.arange(n) * 2 // n for n in lengths]).astype(np.uint8)  # a pair each
        return Examples(tokens, np.concatenate([[0], ends]), targets, halves if self.kinds > 1 else None)


def find(use: str) -> type[Task]:
    """The task that a scenario names.

    Raises:
        SettingError: nothing importable has that name.
    """
    return plugins.find_of("tasks", use, Task)  # type: ignore[type-abstract]
