"""`fedlora compress`: a base model made smaller, as a folder that `model.base` may name.

By the weights alone, or by a statistic of public texts; nothing here is private, and nothing is noised. A run
takes the statistic of its clients' rows (`fedlora.statistic_round`), and cuts by the same functions.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedlora import public, seeding
from fedlora.compressors import contract
from fedlora.compressors.contract import Compressor, Cut, Kind, LowRank, Statistic
from fedlora.compressors.pruner import Pass, Pruner, remade, turned
from fedlora.errors import SettingError, UserError, counted
from fedlora.kinds.targets import ALL, choose
from fedlora.rounds.checkpoint import whole_folder
from fedlora.tasks import base_model, located, smaller

LOW_RANK = ["layer", "of low rank"]  # what a part of a manifest is called, and what became of it
Judge = Callable[[Any], float]  # the perplexity of a model

_LENGTH = 128  # tokens of a text


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
        wide, low = max(map(len, layers)), self.manifest["part"] == LOW_RANK
        head = f"{'rank':>6}  {'error':>6}  weighted" if low else f"{'kept':>6}  {'error':>6}"
        lines = [f"{self.manifest['part'][0]:<{wide}}  {'out x in':>13}  {head}"]
        for name, layer in layers.items():
            shape = " x ".join(map(str, layer["shape"]))
            rank = "whole" if layer["rank"] is None else str(layer["rank"])
            weighted = "" if layer["weighted"] is None else f"{layer['weighted']:8.3f}"
            lines.append(f"{name:<{wide}}  {shape:>13}  {rank:>6}  {layer['error']:6.3f}  {weighted}".rstrip())
        share = told["after"] / told["before"]
        lines.append(f"{told['before']:,} numbers before, {told['after']:,} now ({share:.0%})")
        if (said := self.manifest.get("perplexity")) is not None:
            lines.append(f"perplexity {said['before']:.4g} before, {said['after']:.4g} now")
        if not low:
            lines.append("it is an ordinary folder of transformers: model.base of a scenario names it")
        elif self.manifest["loads_without_fedlora"]:
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
        return {name: weight.T if turned(self.layers[name]) else weight for name, weight in found.items()}

    def become(self, cuts: Mapping[str, Cut]) -> None:
        """Take on what is left of each layer."""
        import torch

        for name, cut in cuts.items():
            if cut.left is not None and cut.right is not None:
                made = torch.from_numpy(cut.left @ cut.right)
                self.layers[name].weight.data.copy_(made.T if turned(self.layers[name]) else made)


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
        for key, asked in (("targets", tuple(targets) != (ALL,)), ("exclude", bool(exclude))):
            if asked and not made.layered:
                raise SettingError(key, f"{use} leaves whole blocks out, whatever their layers: leave it out")
        kind = _kind(made, use, statistic, texts is not None)
        read = [public.read(Path(file), column) if file is not None else [] for file in (texts, perplexity)]
        loaded, reader = load(base, revision, targets, exclude)
        if perplexity is not None and not loaded.model.can_generate():
            raise SettingError("perplexity", f"{base} writes no text: leave it out")
        room = base_model.positions(loaded.model) or max_length or _LENGTH
        cut_to = min(_LENGTH, room) if max_length is None else max_length
        if not 2 <= cut_to <= room:
            raise SettingError("max_length", f"should be from 2 to {room}, for which the model has positions")
        loaded = asked_for(made, loaded)
        passes: list[Pass] = []
        known: dict[str, Statistic] = {}
        if kind is not None:
            public.check(reader)
        if kind == contract.TEXTS:
            passes = public.passes(loaded.model, reader, read[0], cut_to)
        elif kind is not None:
            known = public.statistic(loaded.model, loaded.layers, reader, kind, read[0], cut_to)
            check_known(made, loaded, known)
        about: dict[str, Any] = {"base": base, "revision": revision}
        about["base_fingerprint"] = located.fingerprint(base, revision)
        about["statistic"] = None if kind is None else {"kind": kind, "of": "texts", "texts": len(read[0])}
        judge = None
        if perplexity is not None:
            judge = partial(public.perplexity, reader=reader, texts=read[1], max_length=cut_to)
        return write(out, loaded, reader, made, use, known, about, whole=whole, passes=passes, judge=judge)


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
    passes: Sequence[Pass] = (),
    judge: Judge | None = None,
) -> Compressed:
    """Make a base smaller and write it as a folder, whole or not at all.

    Args:
        out: the folder.
        loaded: the base.
        reader: its tokenizer or image processor; None: there is none to write.
        compressor: that decides.
        use: its name.
        known: of layers, their statistics.
        about: what the manifest says of where it comes from.
        whole: multiply factors out.
        passes: of public texts, for a compressor that takes them.
        judge: gives the perplexity of a model, before and after.
    """
    job = _Job(loaded, {"use": use, "keep": compressor.keep, **about}, known, whole, passes, judge)
    with whole_folder(out) as new, base_model.quietly():
        if reader is not None:
            reader.save_pretrained(str(new))
        if isinstance(compressor, Pruner):
            manifest = job.pruned(new, compressor)
        else:
            assert isinstance(compressor, LowRank)
            manifest = job.thinned(new, contract.compress(compressor, loaded.weights(), known))
    return Compressed(out, manifest)


def assemble(out: Path, loaded: Loaded, reader: Any, cuts: Mapping[str, Cut], about: Mapping[str, Any]) -> None:
    """Write a base whose layers were cut elsewhere; the arguments are those of `write`.

    Args:
        out: the folder.
        loaded: the base.
        reader: its tokenizer or image processor, or None.
        cuts: of all of its layers.
        about: what the manifest says of where they come from.
    """
    with whole_folder(out) as new, base_model.quietly():
        if reader is not None:
            reader.save_pretrained(str(new))
        _Job(loaded, about).thinned(new, cuts)


@dataclass(frozen=True)
class _Job:
    """A base to be written smaller, whichever way; the attributes are arguments of `write`."""

    loaded: Loaded
    about: Mapping[str, Any]
    known: Mapping[str, Statistic] = field(default_factory=dict)
    whole: bool = False
    passes: Sequence[Pass] = ()
    judge: Judge | None = None

    def thinned(self, new: Path, cuts: Mapping[str, Cut]) -> dict[str, Any]:
        """Write a base with layers of low rank; the manifest."""
        loaded, before = self.loaded, self._before()
        saved = sum(cut.shape[0] * cut.shape[1] - cut.numbers for cut in cuts.values())
        layers = {
            name: {
                "shape": list(cut.shape),
                "rank": cut.rank,
                "error": cut.error,
                "weighted": cut.weighted if name in self.known else None,
                "transposed": turned(loaded.layers[name]),
            }
            for name, cut in cuts.items()
        }
        told = self._told(before, before["numbers"] - saved, LOW_RANK, layers)
        if self.judge is not None:
            uncut = {name: weight.copy() for name, weight in loaded.weights().items()}
            loaded.become(cuts)
            told["perplexity"] = {"before": before["perplexity"], "after": self.judge(loaded.model)}
            loaded.become(
                {n: Cut(c.shape, uncut[n], np.eye(c.shape[1], dtype=np.float32)) for n, c in cuts.items()}
            )
        return smaller.write(new, loaded.model, cuts, told, self.whole)

    def pruned(self, new: Path, compressor: Pruner) -> dict[str, Any]:
        """Write a base of fewer parts; the manifest."""
        before, pruned = self._before(), compressor.prune(self.loaded.model, self.known, self.passes)
        with seeding.ambient(0, "pruned"):  # what transformers draws is overwritten
            model = remade(self.loaded.model, pruned.config, pruned.state)
        layers = {
            name: {
                "shape": list(part.shape),
                "rank": part.kept,
                "error": part.error,
                "weighted": None,
                "transposed": False,
            }
            for name, part in pruned.parts.items()
        }
        after = sum(p.numel() for p in model.parameters())
        told = self._told(before, after, list(compressor.part), layers)
        if self.judge is not None:
            told["perplexity"] = {"before": before["perplexity"], "after": self.judge(model)}
        return smaller.ordinary(new, model, told)

    def _before(self) -> dict[str, Any]:
        """What the base is as it stands."""
        model = self.loaded.model
        numbers = sum(p.numel() for p in model.parameters())
        return {"numbers": numbers, "perplexity": None if self.judge is None else self.judge(model)}

    def _told(self, before: Mapping[str, Any], after: int, part: list[str], layers: Any) -> dict[str, Any]:
        """The manifest but for what its writer adds."""
        numbers = {"before": before["numbers"], "after": after}
        return {**self.about, "parameters": numbers, "part": part, "layers": layers}


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


def asked_for(compressor: Compressor, loaded: Loaded) -> Loaded:
    """A base with the layers alone that a compressor goes by.

    Raises:
        SettingError: the base is not made so that it can be cut in that way.
    """
    names = compressor.goes_by(loaded.model, [*loaded.layers])
    return replace(loaded, layers={name: loaded.layers[name] for name in names})


def check_known(compressor: Compressor, loaded: Loaded, known: Collection[str]) -> None:
    """Make sure that a compressor which cuts all parts alike has a statistic of each layer that it goes by.

    Raises:
        SettingError: it has not.
    """
    if isinstance(compressor, Pruner) and (missing := [name for name in loaded.layers if name not in known]):
        raise SettingError("statistics.layers", f"all parts are cut alike, and {missing[0]} has no statistic")


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


def _kind(compressor: Compressor, use: str, asked: Kind | None, texts: bool) -> Kind | Literal["texts"] | None:
    """The statistic that texts are asked for; None: none is taken."""
    if asked is not None and asked not in compressor.takes:
        takes = " or ".join(compressor.takes) or "the weights alone"
        raise SettingError("statistic", f"{use} goes by {takes}: leave it out")
    if not texts:
        if compressor.needs or asked is not None:
            first = asked or compressor.takes[0]
            what = "public texts" if first == contract.TEXTS else f"{first} of texts"
            raise SettingError("texts", f"{use} goes by {what}: name a file of them")
        return None
    able = [kind for kind in ([asked] if asked else compressor.takes) if kind != "row_fisher"]
    if not able and compressor.takes:
        raise SettingError(
            "statistic", "row_fisher is of a loss, which texts alone have not: name it in a scenario"
        )
    if not able:
        raise SettingError("texts", f"{use} goes by the weights alone: leave it out")
    return able[0]


def summed(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a summary says of a smaller base: how, how small, and the mean error of the layers that were cut."""
    cut = [layer for layer in told["layers"].values() if layer["rank"] is not None]
    error = sum(layer["error"] for layer in cut) / len(cut) if cut else 0.0
    keys = ("use", "keep", "statistic", "parameters", "fingerprint")
    one, became = told.get("part", LOW_RANK)
    words = {"layers": counted(len(cut), one), "became": became, "error": round(error, 4)}
    return {key: told[key] for key in keys} | words
