"""Public texts: read from a file, and passed through a model to see what it needs, and how well it writes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedlora.compressors.contract import Kind, Statistic
from fedlora.compressors.pruner import Pass
from fedlora.data.cells import Column, check_whole
from fedlora.data.tables import no_column, read_table
from fedlora.errors import SettingError
from fedlora.passes.statistic import Collector
from fedlora.tasks import base_model

_TEXTS = 16  # of a pass
_TRIED = (7, 5)  # tokens of those that are passed to see what a model is like


def check(reader: Any) -> None:
    """Make sure that a base reads texts.

    Raises:
        SettingError: it has no tokenizer.
    """
    if reader is None or not hasattr(reader, "get_vocab"):
        raise SettingError("texts", "the base has no tokenizer: take a compressor that goes by the weights alone")


def read(file: Path, column: str | None) -> list[str]:
    """Texts of a file: its lines, or a column of a table; empty ones are left out.

    Raises:
        SettingError: it cannot be read, or holds none.
    """
    if file.suffix.lower() == ".txt":
        try:
            found = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError("texts", f"{file}: cannot be read as UTF-8") from error
    else:
        table = read_table("texts", file, None)
        name = column or next(iter(table.columns))
        if name not in table.columns:
            raise no_column("column", file, name, table)
        check_whole(table[name].tolist(), Column("texts", str(file), name))
        found = [cell for cell in table[name] if isinstance(cell, str)]
    if not (found := [text for text in found if text.strip()]):
        raise SettingError("texts", f"{file}: holds no text")
    return found


def statistic(
    model: Any, layers: Mapping[str, Any], reader: Any, kind: Kind, texts: Sequence[str], max_length: int
) -> dict[str, Statistic]:
    """The statistic of public texts, layer by layer, without noise."""
    import torch

    def trial() -> int:
        ids = torch.tensor([list(range(1, n + 1)) + [0] * (max(_TRIED) - n) for n in _TRIED])
        with torch.no_grad():
            _run(model, ids, torch.tensor([[1] * n + [0] * (max(_TRIED) - n) for n in _TRIED]))
        return len(_TRIED)

    collector = Collector(layers, kind, lambda x: None, trial)
    for ids, mask in batches(reader, texts, max_length, model):
        with torch.no_grad(), collector.adding([1.0] * len(ids), mask):
            _run(model, ids, mask)
    sums = {name: total / len(texts) for name, total in collector.take().items()}
    return {name: Statistic(kind, sums[own]) for name, own in collector.shared.items()}


def passes(model: Any, reader: Any, texts: Sequence[str], max_length: int) -> list[Pass]:
    """Has a model pass texts, some at a time."""
    return [partial(_states, model, *each) for each in batches(reader, texts, max_length, model)]


def batches(reader: Any, texts: Sequence[str], max_length: int, model: Any) -> Iterator[tuple[Any, Any]]:
    """Texts as tokens with their mask, (texts, longest) each, those of like length together."""
    import torch

    pad = base_model.pad_of(reader, model.get_input_embeddings().num_embeddings)
    rows = sorted((reader(text, truncation=True, max_length=max_length)["input_ids"] for text in texts), key=len)
    rows = [row or [base_model.filler(reader)] for row in rows]
    for start in range(0, len(rows), _TEXTS):
        part = rows[start : start + _TEXTS]
        longest = max(map(len, part))
        yield (
            torch.tensor([row + [pad] * (longest - len(row)) for row in part]),
            torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part]),
        )


def _run(model: Any, ids: Any, mask: Any) -> Any:
    told = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, attention_mask=mask, **told)


def _states(model: Any, ids: Any, mask: Any) -> Any:
    """The last hidden states of the tokens of some texts, (tokens, width)."""
    import torch

    with torch.no_grad():
        return _run(model.base_model, ids, mask).last_hidden_state[mask.bool()].float()


def perplexity(model: Any, reader: Any, texts: Sequence[str], max_length: int) -> float:
    """`exp` of the mean negative log probability of a token, over all tokens but the first of each text."""
    import torch

    lost, count = 0.0, 0
    for ids, mask in batches(reader, texts, max_length, model):
        with torch.no_grad():
            logits = _run(model, ids, mask).logits[:, :-1].float()
        scored = mask[:, 1:].bool()
        each = torch.nn.functional.cross_entropy(logits[scored], ids[:, 1:][scored], reduction="sum")
        lost, count = lost + float(each), count + int(scored.sum())
    if not count:
        raise SettingError("perplexity", "every text is a single token")
    return math.exp(min(lost / count, 700.0))
