"""`fedlora compress`: a base model made smaller, as a folder that `model.base` may name.

By the weights alone, or by a statistic of public texts; nothing here is private, and nothing is noised. A run
takes the statistic of its clients' rows (`fedlora.statistic_round`), and cuts by the same functions.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.compressors import contract
from fedlora.compressors.contract import Compressor, Cut, Kind, Statistic
from fedlora.data.cells import Column, check_whole
from fedlora.data.tables import no_column, read_table
from fedlora.errors import SettingError, UserError, counted
from fedlora.kinds.targets import ALL, choose
from fedlora.passes.statistic import Collector
from fedlora.rounds.checkpoint import whole_folder
from fedlora.tasks import base_model, located, smaller

_TEXTS = 16  # of a pass
_LENGTH = 128  # tokens of a text
_TRIED = (7, 5)  # tokens of those that are passed to see what a model is like


@dataclass(frozen=True)
class Compressed:
    """What became of a base.

    Attributes:
        folder: that it was written to.
        manifest: as `manifest.json` has it.
    """

    folder: Path
    manifest: Mapping[str, Any]

    def lines(self) -> list[str]:
        """What a terminal shows: each layer with its rank and its error, and the sums."""
        layers, told = self.manifest["layers"], self.manifest["parameters"]
        wide = max(map(len, layers))
        lines = [f"{'layer':<{wide}}  {'out x in':>13}  {'rank':>6}  {'error':>6}  weighted"]
        for name, layer in layers.items():
            shape, rank = " x ".join(map(str, layer["shape"])), layer["rank"] or "whole"
            weighted = "" if layer["weighted"] is None else f"{layer['weighted']:8.3f}"
            lines.append(f"{name:<{wide}}  {shape:>13}  {rank:>6}  {layer['error']:6.3f}  {weighted}".rstrip())
        share = told["after"] / told["before"]
        lines.append(f"{told['before']:,} numbers before, {told['after']:,} now ({share:.0%})")
        if (said := self.manifest.get("perplexity")) is not None:
            lines.append(f"perplexity {said['before']:.4g} before, {said['after']:.4g} now")
        if self.manifest["loads_without_fedlora"]:
            lines.append("the factors are multiplied out: an ordinary folder of transformers, as large as before")
        else:
            lines.append("it is of factors, which transformers cannot load: model.base of a scenario names it")
        return [*lines, str(self.folder)]


@dataclass(frozen=True)
class Loaded:
    """A base to be cut.

    Attributes:
        model: of transformers, in evaluation.
        layers: those to cut, by name.
    """

    model: Any
    layers: Mapping[str, Any]

    def weights(self) -> dict[str, Any]:
        """Of each layer, (out x in) in float32."""
        found = {name: layer.weight.detach().float().numpy() for name, layer in self.layers.items()}
        return {name: weight.T if self.turned(name) else weight for name, weight in found.items()}

    def turned(self, name: str) -> bool:
        """Whether a layer keeps its weight as (in x out)."""
        return type(self.layers[name]).__name__ == "Conv1D"

    def become(self, cuts: Mapping[str, Cut]) -> None:
        """Take on what is left of each layer."""
        import torch

        for name, cut in cuts.items():
            if cut.left is not None and cut.right is not None:
                made = torch.from_numpy(cut.left @ cut.right)
                self.layers[name].weight.data.copy_(made.T if self.turned(name) else made)


def compress(
    base: str,
    out: str | Path,
    *,
    use: str,
    keep: float = 0.7,
    revision: str | None = None,
    texts: str | Path | None = None,
    column: str | None = None,
    statistic: Kind | None = None,
    perplexity: str | Path | None = None,
    targets: Sequence[str] = (ALL,),
    exclude: Sequence[str] = (),
    max_length: int | None = None,
    whole: bool = False,
) -> Compressed:
    """Make a base model smaller, by its weights or by public texts.

    Args:
        base: as `model.base`.
        out: a folder to make.
        use: the compressor, a name of `fedlora list compressors`, or `module:Class` of one's own.
        keep: share of the numbers of the layers that is kept.
        revision: as `model.revision`.
        texts: a file of public texts for the statistic: a txt with one in each line, or a table.
        column: of texts in a table.
        statistic: which one; None: the first that the compressor takes.
        perplexity: a file of texts to judge the base by, before and after; of models that write.
        targets: the layers to cut, as `model.adapter.targets`.
        exclude: those that stay, as `model.adapter.exclude`.
        max_length: tokens that a text is cut to; None: 128, or as many as the model has positions for.
        whole: multiply the factors out, so that transformers can load the folder.

    Returns:
        The folder, and what was done.

    Raises:
        UserError: the input is wrong; nothing was written.
    """
    if (out := Path(out)).exists():
        raise UserError(f"{out}: is there already; name another folder with --out")
    with _named():
        made = contract.load(use, {"keep": keep})
        kind = _kind(made, use, statistic, texts is not None)
        read = [read_texts(Path(file), column) if file is not None else [] for file in (texts, perplexity)]
        loaded, reader = load(base, revision, targets, exclude)
        if perplexity is not None and not loaded.model.can_generate():
            raise SettingError("perplexity", f"{base} writes no text: leave it out")
        room = base_model.positions(loaded.model) or max_length or _LENGTH
        cut_to = min(_LENGTH, room) if max_length is None else max_length
        if not 2 <= cut_to <= room:
            raise SettingError("max_length", f"should be from 2 to {room}, for which the model has positions")
        known = {} if kind is None else _of_texts(loaded, reader, kind, read[0], cut_to)
        about: dict[str, Any] = {"base": base, "revision": revision}
        about["base_fingerprint"] = located.fingerprint(base, revision)
        about["statistic"] = None if kind is None else {"kind": kind, "of": "texts", "texts": len(read[0])}
        judged = None if perplexity is None else (loaded, reader, read[1], cut_to)
        return write(out, loaded, reader, made, use, known, about, whole=whole, judged=judged)


def write(
    out: Path,
    loaded: Loaded,
    reader: Any,
    compressor: Compressor,
    use: str,
    known: Mapping[str, Statistic],
    about: Mapping[str, Any],
    *,
    whole: bool = False,
    judged: Any = None,
) -> Compressed:
    """Cut a base and write it as a folder, whole or not at all.

    Args:
        out: the folder.
        loaded: the base; with `judged` it is cut itself.
        reader: its tokenizer or image processor; None: there is none to write.
        compressor: that cuts.
        use: its name.
        known: of layers, their statistics.
        about: what the manifest says of where it comes from.
        whole: multiply the factors out.
        judged: what `_perplexity` takes, to be asked before and after.
    """
    weights = loaded.weights()
    cuts = contract.compress(compressor, weights, known)
    before = sum(p.numel() for p in loaded.model.parameters())
    saved = sum(weights[name].size - cut.numbers for name, cut in cuts.items())
    layers = {
        name: {
            "shape": list(cut.shape),
            "rank": cut.rank,
            "error": cut.error,
            "weighted": cut.weighted if name in known else None,
            "transposed": loaded.turned(name),
        }
        for name, cut in cuts.items()
    }
    told = {
        "use": use,
        "keep": compressor.keep,
        **about,
        "parameters": {"before": before, "after": before - saved},
        "layers": layers,
    }
    if judged is not None:
        first = _perplexity(*judged)
    with whole_folder(out) as new, base_model.quietly():
        if reader is not None:
            reader.save_pretrained(str(new))
        if judged is not None:
            uncut = {name: weight.copy() for name, weight in weights.items()}
            loaded.become(cuts)
            told["perplexity"] = {"before": first, "after": _perplexity(*judged)}
            loaded.become(
                {n: Cut(c.shape, uncut[n], np.eye(c.shape[1], dtype=np.float32)) for n, c in cuts.items()}
            )
        manifest = smaller.write(new, loaded.model, cuts, told, whole)
    return Compressed(out, manifest)


def load(base: str, revision: str | None, targets: Sequence[str], exclude: Sequence[str]) -> tuple[Loaded, Any]:
    """A base to be cut, as its configuration names its class; and its tokenizer or image processor, if it has one.

    Raises:
        SettingError: it cannot be had, was cut before, or has no such layers.
    """
    import transformers

    located.check(base, revision)
    path, more = located.find_base(base), revision or "main"
    if located.is_factored(path):
        raise SettingError("model.base", f"{base} was cut already: name the whole base")
    with base_model.loading(base, path, "model"):
        config = transformers.AutoConfig.from_pretrained(path, revision=more)
        named = [getattr(transformers, name, None) for name in config.architectures or ()]
        cls = next((found for found in named if found is not None), transformers.AutoModel)
        model = cls.from_pretrained(path, revision=more, dtype="auto").eval()
    try:
        beside = base_model.heads_of(model) if hasattr(model, model.base_model_prefix) else []
        chosen = choose(model, beside, targets, exclude)
    except SettingError as error:
        raise SettingError(error.key.replace("model.adapter.", "compress."), error.message) from error
    return Loaded(model, {name: model.get_submodule(name) for name in chosen}), _reader(path, more)


def _reader(path: str, revision: str) -> Any:
    """The tokenizer, or else the image processor; None where a base has neither."""
    import transformers

    for auto in (transformers.AutoTokenizer, transformers.AutoImageProcessor):
        with (
            contextlib.suppress(Exception),
            base_model.quietly(),
        ):  # whatever the library says of what is not there
            return auto.from_pretrained(path, revision=revision)
    return None


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Mistakes by the names that they have on the command line."""
    try:
        yield
    except SettingError as error:
        key = error.key.rpartition(".")[2].replace("_", "-")
        raise UserError(f"{'BASE' if error.key == 'model.base' else f'--{key}'}: {error.message}") from error


def _kind(compressor: Compressor, use: str, asked: Kind | None, texts: bool) -> Kind | None:
    """The statistic that texts are asked for; None: none is taken."""
    if asked is not None and asked not in compressor.takes:
        takes = " or ".join(compressor.takes) or "the weights alone"
        raise SettingError("statistic", f"{use} goes by {takes}: leave it out")
    if not texts:
        if compressor.needs or asked is not None:
            raise SettingError(
                "texts", f"{use} goes by {asked or compressor.takes[0]} of texts: name a file of them"
            )
        return None
    able = [kind for kind in ([asked] if asked else compressor.takes) if kind != "row_fisher"]
    if not able and compressor.takes:
        raise SettingError(
            "statistic", "row_fisher is of a loss, which texts alone have not: name it in a scenario"
        )
    if not able:
        raise SettingError("texts", f"{use} goes by the weights alone: leave it out")
    return able[0]


def read_texts(file: Path, column: str | None) -> list[str]:
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


def _of_texts(
    loaded: Loaded, reader: Any, kind: Kind, texts: Sequence[str], max_length: int
) -> dict[str, Statistic]:
    """The statistic of public texts, layer by layer, without noise."""
    import torch

    if reader is None or not hasattr(reader, "get_vocab"):
        raise SettingError("texts", "the base has no tokenizer: take a compressor that goes by the weights alone")

    def trial() -> int:
        ids = torch.tensor([list(range(1, n + 1)) + [0] * (max(_TRIED) - n) for n in _TRIED])
        with torch.no_grad():
            _run(loaded.model, ids, torch.tensor([[1] * n + [0] * (max(_TRIED) - n) for n in _TRIED]))
        return len(_TRIED)

    collector = Collector(loaded.layers, kind, lambda x: None, trial)
    for ids, mask in batches(reader, texts, max_length, loaded.model):
        with torch.no_grad(), collector.adding([1.0] * len(ids), mask):
            _run(loaded.model, ids, mask)
    sums = {name: total / len(texts) for name, total in collector.take().items()}
    return {name: Statistic(kind, sums[own]) for name, own in collector.shared.items()}


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


def _perplexity(loaded: Loaded, reader: Any, texts: Sequence[str], max_length: int) -> float:
    """`exp` of the mean negative log probability of a token, over all tokens but the first of each text."""
    import torch

    lost, count = 0.0, 0
    for ids, mask in batches(reader, texts, max_length, loaded.model):
        with torch.no_grad():
            logits = _run(loaded.model, ids, mask).logits[:, :-1].float()
        scored = mask[:, 1:].bool()
        each = torch.nn.functional.cross_entropy(logits[scored], ids[:, 1:][scored], reduction="sum")
        lost, count = lost + float(each), count + int(scored.sum())
    if not count:
        raise SettingError("perplexity", "every text is a single token")
    return math.exp(min(lost / count, 700.0))


def summed(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a summary says of a smaller base: how, how small, and the mean error of the layers that were cut."""
    cut = [layer for layer in told["layers"].values() if layer["rank"] is not None]
    error = sum(layer["error"] for layer in cut) / len(cut) if cut else 0.0
    keys = ("use", "keep", "statistic", "parameters", "fingerprint")
    return {key: told[key] for key in keys} | {"layers": counted(len(cut), "layer"), "error": round(error, 4)}
