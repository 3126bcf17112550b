"""Causal language modelling: the completion of a prompt, or all of a text, one token after another."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlora import seeding
from fedlora.data.reading import Rows
from fedlora.data.store import Encoded, Examples
from fedlora.metrics.written import rouge_l
from fedlora.passes.packing import Segments
from fedlora.tasks import base_model, dialogues
from fedlora.tasks.contract import Batch, Problem, Prompt, Sums, Task, TaskTarget

if TYPE_CHECKING:
    import torch

_ANSWERS = 8  # that are written at once


class CausalLM(Task):
    """The next token of a completion: mean token loss of an example, and perplexity."""

    task_type = "CAUSAL_LM"
    metric = "perplexity"
    higher_is_better = False
    auto = "AutoModelForCausalLM"
    headed = False
    labelled = False
    target: ClassVar[TaskTarget] = "start"
    pools = False
    completes = True

    @classmethod
    def needs(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        """No labels; with `exact_match` answers, in a column or in chats."""
        data, model = sections.get("data"), sections.get("model")
        if data and data.partition.kind in ("dirichlet", "pathological", "shards", "label_shares"):
            yield (
                ("data", "partition", "kind"),
                f"{data.partition.kind} splits by label, and causal_lm has none: use iid, size or natural",
            )
        yield from no_pairs(sections)
        if sections.get("exact_match") and data and data.files and not (data.files.label or data.messages):
            yield ("data", "files", "label"), "exact_match needs the name of the column of answers"
        if model and model.pooler == "trained":
            yield ("model", "pooler"), "a causal language model has no pooler"

    @classmethod
    def encode(cls, reader: Any, rows: Rows, labels: Sequence[str], max_length: int) -> Encoded:
        """Prompt and completion in one sequence, by the chat template where there is one.

        The target is how many leading tokens belong to the prompt: they are not scored. Without a
        completion all of the text is. An example always keeps one scored token, so a prompt that is
        longer than `max_length` loses its beginning. In chats every token has a mark too where several turns are
        scored (`fedlora.tasks.dialogues`).

        Raises:
            SettingError: the chat template refuses a chat, or there is none.
        """
        if rows.texts and dialogues.is_chat(rows.texts[0]):
            return dialogues.encode(reader, rows, max_length)
        end = [] if reader.eos_token_id is None else [reader.eos_token_id]
        if rows.labels is None:
            plain = reader(rows.texts, truncation=True, max_length=max_length - len(end))["input_ids"]
            return Encoded([ids + end for ids in plain], [0] * len(plain))
        answers = reader([str(label) for label in rows.labels], add_special_tokens=False)["input_ids"]
        tokens, starts, cut = [], [], 0
        for prompt, answer in zip(prompts(reader, [str(t) for t in rows.texts]), answers, strict=True):
            cut += len(prompt) + len(answer) + len(end) > max_length
            answer = (answer + end)[: max_length - 1]
            prompt = (prompt or [base_model.filler(reader)])[max(0, len(prompt) + len(answer) - max_length) :]
            tokens.append(prompt + answer)
            starts.append(len(prompt))
        return Encoded(tokens, starts, cut=cut)

    @classmethod
    def answer(
        cls, model: Any, reader: Any, text: str, labels: Sequence[str], max_length: int, max_new_tokens: int
    ) -> tuple[str, float | None]:
        """The completion, by greedy decoding."""
        (said,) = cls.complete(model, reader, [text], max_length, max_new_tokens=max_new_tokens)
        return said, None

    @classmethod
    def complete(
        cls, model: Any, reader: Any, prompts: Sequence[Prompt], max_length: int, **how: Any
    ) -> list[str]:
        """The completion of each prompt, of which the last `max_length` tokens are read."""
        pad = base_model.pad_of(reader, model.get_input_embeddings().num_embeddings)
        asked = [question(reader, prompt, max_length) for prompt in prompts]
        return [
            reader.decode(made, skip_special_tokens=True).strip() for made in completions(model, asked, pad, **how)
        ]

    def _scored(self, batch: Batch) -> "torch.Tensor":
        """Whether the token after each one is scored, (examples, longest - 1)."""
        import torch

        mask = batch["attention_mask"][:, 1:].bool()
        if "marks" in batch:
            return mask & (batch["marks"][:, 1:] >= 0)
        position = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        return mask & (position >= batch["targets"][:, None])

    def logits(self, batch: Batch) -> "torch.Tensor":
        """Of the tokens before scored ones, (scored tokens, vocabulary)."""
        mask, scored = batch["attention_mask"], self._scored(batch)
        if self.packing is None:
            return self._run(batch).logits[:, :-1][scored].float()  # type: ignore[no-any-return]
        places = mask.flatten().cumsum(0).view_as(mask) - 1  # of each token in the row
        kept = places[:, :-1][scored]
        self.packing.cut = {len(kept): Segments(scored)}
        logits: torch.Tensor = self._run(batch, logits_to_keep=kept).logits[0]
        return logits.float()

    def _token_losses(self, batch: Batch) -> tuple["torch.Tensor", "torch.Tensor"]:
        """The loss of each predicted token, 0 if it is not scored, and whether it is; (examples, longest - 1)."""
        from torch.nn.functional import cross_entropy

        scored = self._scored(batch)
        losses = cross_entropy(self.logits(batch), batch["input_ids"][:, 1:][scored], reduction="none")
        return Segments(scored).batch(losses[None]), scored

    def losses(self, batch: Batch) -> "torch.Tensor":
        """Mean loss over the scored tokens of each example, (examples,)."""
        losses, scored = self._token_losses(batch)
        return losses.sum(-1) / scored.sum(-1).clamp(min=1)

    def score(self, batch: Batch) -> dict[str, float]:
        """Sums over scored tokens."""
        losses, scored = self._token_losses(batch)
        return {"loss": float(losses.sum()), "tokens": float(scored.sum())}

    def figures(self, sums: Sums) -> dict[str, float]:
        """Mean loss of a token and its exponential; where answers were written, how many match, and ROUGE-L."""
        loss = sums["loss"] / max(sums["tokens"], 1.0)
        told = {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0)))}
        if "asked" in sums:
            told |= {"exact_match": sums["matched"] / sums["asked"], "rouge_l": sums["overlap"] / sums["asked"]}
        return told

    def match(
        self, tokenizer: Any, examples: Examples, rows: NDArray[np.int64], max_new_tokens: int, pattern: str | None
    ) -> dict[str, float]:
        """Write the completion of each prompt, by greedy decoding, with the adapter that is in the model.

        An example whose own answer was cut by `max_length` before the pattern matches counts as missed.

        Args:
            tokenizer: of the base model.
            examples: prompts and completions.
            rows: the examples to ask.
            max_new_tokens: that an answer may have.
            pattern: the last match of it is compared, its first group if it has one; None: all of the text.

        Returns:
            Sums of the answers that are `asked` for and that `matched`, and of their ROUGE-L (`overlap`).
        """
        import torch

        kept = [examples.row(int(row)) for row in rows]
        starts = [int(start) for start in examples.targets[rows]]
        asked = [tokens[:start] for tokens, start in zip(kept, starts, strict=True)]
        told = {"asked": float(len(kept)), "matched": 0.0, "overlap": 0.0}
        with torch.inference_mode(), self.packing.away() if self.packing else contextlib.nullcontext():
            made = completions(self.model, asked, self.pad, max_new_tokens=max_new_tokens)
            for tokens, start, said in zip(kept, starts, made, strict=True):
                pair = [tokenizer.decode(part, skip_special_tokens=True) for part in (tokens[start:], said)]
                given, found = (_answer(text, pattern) for text in pair)
                told["matched"] += given is not None and given == found
                told["overlap"] += rouge_l(pair[1], pair[0])
        return told

    def written(self, reader: Any, examples: Examples, rows: NDArray[np.int64], asked: Any) -> dict[str, float]:
        """How many of the answers that are asked for match, and how far they overlap."""
        if not len(rows := rows[rows < asked.examples]):
            return {}
        return self.match(reader(), examples, rows, asked.max_new_tokens, asked.pattern)


def completions(
    model: Any,
    asked: Sequence[Sequence[int] | NDArray[Any]],
    pad: int,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[NDArray[np.int64]]:
    """What a model writes after each prompt, some at once; what follows the end is padding.

    Args:
        model: of transformers or peft, in evaluation.
        asked: the tokens of each prompt.
        pad: the id of the padding token.
        max_new_tokens: that a completion may have.
        temperature: logits are divided by it before a token is drawn; 0: the likeliest is taken.
        top_p: only the likeliest tokens that have such a share together are drawn.
        seed: of what is drawn.

    Raises:
        SettingError: the model has no positions for a prompt and what follows it.
    """
    import torch

    base_model.check_writing(model, max(map(len, asked), default=0), max_new_tokens)
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    for start in range(0, len(asked), _ANSWERS):
        chunk = asked[start : start + _ANSWERS]
        width = max(map(len, chunk))
        ids = np.full((len(chunk), width), pad, np.int64)
        mask = np.zeros((len(chunk), width), np.int64)
        for i, tokens in enumerate(chunk):
            ids[i, width - len(tokens) :] = tokens
            mask[i, width - len(tokens) :] = 1
        with seeding.ambient(seed, "write", start):
            made = model.generate(
                input_ids=torch.from_numpy(ids).to(model.device),
                attention_mask=torch.from_numpy(mask).to(model.device),
                max_new_tokens=max_new_tokens,
                use_cache=True,
                pad_token_id=pad,
                **(drawn if temperature else {"do_sample": False}),
            )
        yield from made[:, width:].cpu().numpy()


def question(reader: Any, prompt: Prompt, max_length: int) -> list[int]:
    """The tokens of a prompt or of a chat, the last `max_length` of them.

    Raises:
        SettingError: the chat template refuses it.
    """
    if isinstance(prompt, str):
        return (prompts(reader, [prompt])[0] or [base_model.filler(reader)])[-max_length:]
    return dialogues.question(reader, prompt, max_length)


def prompts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens before a completion, by the chat template where there is one."""
    if tokenizer.chat_template:
        turns = [[{"role": "user", "content": text}] for text in texts]
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
    return list(tokenizer([f"{text}\n" for text in texts])["input_ids"])


def _answer(text: str, pattern: str | None) -> str | None:
    """What of a completion is compared; None where the pattern does not match."""
    if pattern is None:
        return text.strip()
    found = list(re.finditer(pattern, text))
    return found[-1].group(1 if found[-1].re.groups else 0).strip() if found else None


def no_pairs(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """Two columns of texts, for tasks that read one."""
    data, task = sections.get("data"), sections.get("task")
    named = data and (data.hub or data.files)
    if named and not isinstance(named.text, str):
        source = "hub" if data and data.hub else "files"
        instead = ": write data.prompt, a template" if task == "causal_lm" else ""
        yield ("data", source, "text"), f"pairs of columns are for classification, and the task is {task}{instead}"
