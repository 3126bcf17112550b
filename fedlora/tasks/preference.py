"""Preferences: of two completions of a prompt the one that people chose is to be the likelier.

Direct preference optimisation (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290). With the reward of a
completion y of a prompt x

    r(x, y) = beta (log p(y | x) - log ref(y | x))

where log p is the sum over the completion's tokens, the loss of a pair is

    L = -log sigmoid(r(x, chosen) - r(x, rejected))

The reference `ref` is the base without its adapter: a second pass through the same model, without gradients. A
pair is one example: two sequences that do not see each other, with one gradient over both.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data.reading import Rows
from fedlora.data.store import Encoded, Examples
from fedlora.passes.packing import Segments
from fedlora.scenario.sections import Preference as Settings
from fedlora.tasks.base_model import filler
from fedlora.tasks.causal_lm import CausalLM, no_pairs, prompts
from fedlora.tasks.contract import Batch, Problem, Sums

if TYPE_CHECKING:
    import torch

# A target: where the first completion begins, where the second sequence does, where in that the other begins.
_START, _SECOND, _AGAIN = range(3)


class Preference(CausalLM):
    """The better of two completions: DPO's loss, and how often the chosen one has the larger reward."""

    metric = "accuracy"
    higher_is_better = True
    target = "pair"
    against_base = True

    @classmethod
    def needs(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        """Two columns of completions; an adapter that begins as the base."""
        data, model, task = (sections.get(key) for key in ("data", "model", "task"))
        for name in ("files", "hub"):
            source = data and getattr(data, name)
            if source and (not isinstance(source.label, tuple) or len(source.label) != 2):
                yield (
                    ("data", name, "label"),
                    f"{task} needs two columns, of completions that were chosen and rejected: write "
                    "[chosen, rejected]",
                )
        if data and data.partition.kind in ("dirichlet", "pathological", "shards", "label_shares"):
            yield (
                ("data", "partition", "kind"),
                f"{data.partition.kind} splits by label, and {task} has none: use iid, size or natural",
            )
        yield from no_pairs(sections)
        if sections.get("exact_match"):
            yield ("exact_match",), f"{task} is judged by pairs: drop it, or use task: causal_lm"
        if model and model.pooler == "trained":
            yield ("model", "pooler"), "a causal language model has no pooler"
        if model and model.start is not None:
            yield (
                ("model", "start"),
                f"{task} measures beside the base without an adapter: make a base of it (fedlora export RUN "
                "--merge) and name that by model.base",
            )

    @classmethod
    def encode(cls, reader: Any, rows: Rows, labels: Sequence[str], max_length: int) -> Encoded:
        """Prompt and chosen completion, then prompt and rejected one, each cut to `max_length` tokens.

        The prompt is the same in both: where it is too long beside the longer completion it loses its beginning.
        The target is where the first completion begins, where the second sequence does, and where in that the
        second completion begins.
        """
        end = [] if reader.eos_token_id is None else [reader.eos_token_id]
        pairs = [[str(text) for text in pair] for pair in rows.labels or () if not isinstance(pair, str)]
        sides = [reader([*side], add_special_tokens=False)["input_ids"] for side in zip(*pairs, strict=True)]
        tokens, targets, cut = [], [], 0
        for prompt, chosen, rejected in zip(prompts(reader, [str(t) for t in rows.texts]), *sides, strict=True):
            whole = (chosen + end, rejected + end)
            one, other = (answer[: max_length - 1] for answer in whole)
            prompt = (prompt or [filler(reader)])[-(max_length - max(len(one), len(other))) :]
            tokens.append(prompt + one + prompt + other)
            targets.append((len(prompt), len(prompt + one), len(prompt)))
            cut += (one, other) != whole
        return Encoded(tokens, np.array(targets, np.int64), cut=cut)

    @property
    def beta(self) -> float:
        """What a log probability beside the reference's counts."""
        told = getattr(self.model.get_base_model().config, "preference_beta", None)
        return Settings().beta if told is None else float(told)

    def batch(self, examples: Examples, rows: NDArray[np.int64]) -> Batch:
        """`input_ids` and `attention_mask` (2 pairs, longest), the two of a pair in turn; `targets` (pairs, 3).

        Of examples that are known above the frozen layers `prefix` too.
        """
        targets = examples.targets[rows]
        second = targets[:, _SECOND].astype(int)
        each = [part for row, at in zip(rows, second, strict=True) for part in np.split(examples.row(row), [at])]
        ids = np.full((len(each), max(map(len, each))), self.pad, np.int64)
        mask = np.zeros_like(ids)
        for i, tokens in enumerate(each):
            ids[i, : len(tokens)] = tokens
            mask[i, : len(tokens)] = 1
        return self._placed(examples, rows, {"input_ids": ids, "attention_mask": mask, "targets": targets})

    def _scored(self, batch: Batch) -> "torch.Tensor":
        """Whether the token after each one is of a completion, (2 pairs, longest - 1)."""
        import torch

        mask = batch["attention_mask"][:, 1:].bool()
        position = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        starts = batch["targets"][:, [_START, _AGAIN]].flatten()
        return mask & (position >= starts[:, None])

    def _sums(self, logits: "torch.Tensor", batch: Batch) -> "torch.Tensor":
        """The log probability of each completion, (pairs, 2)."""
        from torch.nn.functional import cross_entropy

        scored = self._scored(batch)
        losses = cross_entropy(logits, batch["input_ids"][:, 1:][scored], reduction="none")
        return -Segments(scored).batch(losses[None]).sum(-1).view(-1, 2)

    def reference(self, batch: Batch) -> "torch.Tensor":
        """The log probability of each completion by the base without its adapter, (pairs, 2)."""
        import torch

        with torch.no_grad(), self.off(), self._beside():
            return self._sums(super().logits(batch), batch)

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Pass once more, whatever is kept of the batch."""
        kept, self._passed = self._passed, None
        try:
            yield
        finally:
            self._passed = kept

    def rewards(self, batch: Batch) -> "torch.Tensor":
        """Of the chosen and the rejected completion of each pair, (pairs, 2)."""
        reference = self.reference(batch)
        return self.beta * (self._sums(self.logits(batch), batch) - reference)

    def losses(self, batch: Batch) -> "torch.Tensor":
        """DPO's loss of each pair, (pairs,)."""
        return _losses(self.rewards(batch))

    def score(self, batch: Batch) -> dict[str, float]:
        """Sums of the loss, of pairs in the right order, those that tie counted half, of margins and of pairs."""
        rewards = self.rewards(batch)
        margins = rewards[:, 0] - rewards[:, 1]
        return {
            "loss": float(_losses(rewards).sum()),
            "right": float((margins > 0).sum()) + float((margins == 0).sum()) / 2,
            "margin": float(margins.sum()),
            "pairs": float(len(margins)),
        }

    def figures(self, sums: Sums) -> dict[str, float]:
        """Mean loss; the share of pairs whose chosen has the larger reward; by how much in the mean."""
        return {
            "loss": sums["loss"] / sums["pairs"],
            "accuracy": sums["right"] / sums["pairs"],
            "margin": sums["margin"] / sums["pairs"],
        }

    def samples(self, max_length: int, special: Collection[int]) -> Examples:
        """Pairs of random sequences: each of a language model's, and the one that is shorter by one, backwards."""
        made = super().samples(max_length, special)
        each = [made.row(i) for i in range(len(made))]
        second = np.maximum(np.arange(len(made)) - 1, 0)
        pairs = [(one, each[other][::-1]) for one, other in zip(each, second, strict=True)]
        first = made.lengths(np.arange(len(made)))
        return replace(
            made,
            tokens=np.concatenate([tokens for pair in pairs for tokens in pair]),
            offsets=np.cumsum([0, *(first + first[second])]),
            targets=np.stack([made.targets, first, made.targets[second]], axis=1).astype(np.int64),
        )


def _losses(rewards: "torch.Tensor") -> "torch.Tensor":
    from torch.nn.functional import logsigmoid

    return -logsigmoid(rewards[:, 0] - rewards[:, 1])
