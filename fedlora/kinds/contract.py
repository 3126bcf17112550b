"""The Kind contract: how a weight's change is written, said in one place.

A kind says what it builds into a model, where each tensor comes from, which of them can train, whether the change
of a weight is linear in them, what the change is, and how it becomes an ordinary LoRA for others to load. Nothing
else assumes how its tensors are called: strategies read the `role` of a slot.
"""

import contextlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fedlora import factors, plugins
from fedlora.adapter import Adapter, Change, Layout, Slot, Tensor
from fedlora.errors import SettingError, suggestion
from fedlora.lazy import Lazy, Thin, Total
from fedlora.seeding import generator

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
"""What peft puts before the names of a model's own modules."""
Weights = Callable[[str], "torch.Tensor"]
"""The frozen weight (out x in) of a layer, by its name."""


@dataclass(frozen=True)
class Part:
    """What the tensors of a role are.

    Attributes:
        origin: of the first value: `seeded`, drawn from the seed; `derived`, from the frozen weights; `zero`. None
            needs to travel.
        trains: whether they can train; the others stay as they were first made.
        weighs: whether the frozen weights have a part in a seeded one too.
    """

    origin: Literal["seeded", "derived", "zero"]
    trains: bool
    weighs: bool = False


@dataclass(frozen=True)
class Saved:
    """An ordinary LoRA as peft saves it, for a run to begin from.

    Attributes:
        tensors: by their names in a saved adapter, those of heads among them.
        scaling: the factor before its `B @ A`.
    """

    tensors: Adapter
    scaling: float

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """B and A of a layer.

        Raises:
            SettingError: it has none there.
        """
        try:
            b, a = (self.tensors[f"{PREFIX}{module}.lora_{side}.weight"] for side in "BA")
        except KeyError:
            raise SettingError(
                "model.start", f"it has no factors for {module}: set model.adapter.targets and layers to its own"
            ) from None
        return b, a


@dataclass(frozen=True)
class Facts:
    """What a kind is like, for lists and tables.

    Attributes:
        sends: what travels of a layer, in a few words.
        noise: `Kind.gain` as a formula of s, r, out and in.
    """

    sends: str = "what trains"
    noise: str = ""


logger = logging.getLogger(__name__)

HEAD = Part("seeded", True)
Gradients = Literal["product", "hooks"]


@dataclass(frozen=True)
class Kind(ABC):
    """A way to write the change of a weight, and to build it into a model.

    Attributes:
        r: the rank, with unequal ranks the server's.
        alpha: the change is multiplied by `alpha / r`.
        targets: the layers that have one, as `fedlora.kinds.targets` reads them.
        layers: numbers of the blocks that have targets, from 0; None: all.
        exclude: layers and parts of the model that have none.
        rslora: the change is multiplied by `alpha / sqrt(r)` instead (Kalajdzievski, 2023,
            https://arxiv.org/abs/2312.03732).
    """

    parts: ClassVar[Mapping[str, Part]]
    """The roles of its tensors beside `head`, and what each is."""

    ordinary: ClassVar[bool] = False
    """Whether its tensors are what peft's LoRA has, so that they are saved as they are."""

    gradients: ClassVar[Gradients] = "hooks"
    """How gradients of single examples are had: by the layers' own low-rank product, or by Opacus's hooks."""

    facts: ClassVar[Facts] = Facts()
    """For lists and tables."""

    thin: ClassVar[bool] = True
    """Whether the change is a product of thin factors, so that it can be merged into the base at sites."""

    convolutions: ClassVar[bool] = False
    """Whether it stands beside convolutions too; their weights are seen as (out x in height width)."""

    r: int
    alpha: float
    targets: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    exclude: tuple[str, ...] = ()
    rslora: bool = False

    @abstractmethod
    def wrap(self, model: Any, heads: Sequence[str], task_type: str | None) -> Any:
        """The model with the adapter in it, as a `peft.PeftModel`.

        Args:
            model: of transformers.
            heads: modules that federate whole; none of them gets factors inside.
            task_type: as peft calls it.

        Raises:
            SettingError: the model has no such targets.
        """

    @abstractmethod
    def role(self, name: str) -> str:
        """What the tensor of that name is for: one of `parts`, or `head`."""

    @abstractmethod
    def shape(self, slot: Slot, rank: int) -> tuple[int, ...]:
        """The shape of a tensor at a client of that rank."""

    @abstractmethod
    def initial(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """The first value of a tensor, from `rng` and the frozen weights alone."""

    def stream(self, slot: Slot) -> str:
        """What a first value is drawn by beside the seed: its tensor's name; what is shared has one word."""
        return slot.name

    @abstractmethod
    def change(self, layout: Layout, adapter: Mapping[str, Tensor]) -> Change:
        """Factors (out x m, m x in) of each layer's change, without the scaling: as thin as it has them."""

    def lazy(self, layout: Layout, adapter: Mapping[str, Tensor]) -> Mapping[str, Lazy]:
        """Each layer's change as a matrix known by its products, without the scaling.

        A kind whose change is no product of thin factors says it here, and `change` by `Lazy.factors`. Errors of
        aggregation and exports are made of this alone.
        """
        return {module: Thin(*pair) for module, pair in self.change(layout, adapter).items()}

    @abstractmethod
    def exact(self, moving: Collection[str]) -> bool:
        """Whether the change is linear in the tensors of some roles, the others being the same everywhere.

        Then the average of the tensors stands for the average of the changes.
        """

    @abstractmethod
    def noise_gain(
        self, layout: Layout, adapter: Mapping[str, Tensor], moving: Collection[str]
    ) -> dict[str, float]:
        """Of each layer, how large its change gets where noise of variance 1 is added to tensors of some roles.

        Returns:
            `sqrt(E || change(adapter + noise) - change(adapter) ||_F^2)`, scaling included, to first order.
        """

    def gain(self, out: int, into: int) -> float | None:
        """`noise_gain` of a layer (out x in) at the first values, where all trains that can.

        Returns:
            None where the shape does not say.
        """
        return None

    def most(self, out: int, into: int) -> int | None:
        """The highest rank beside a layer (out x in); None: any."""
        return None

    def beside(self, role: str, out: int, into: int) -> tuple[int, ...]:
        """The shape of the tensor of a role beside a layer (out x in), at the server's rank."""
        return self.shape(Slot(role, (out, into), role, ""), self.r)

    def numbers(self, out: int, into: int) -> int:
        """How many numbers of a layer (out x in) train."""
        return sum(math.prod(self.beside(role, out, into)) for role in self.parts if self.trains(role))

    def check_rank(self, name: str, out: int, into: int) -> None:
        """Refuse a rank that a layer (out x in) does not have.

        Raises:
            SettingError: with the highest that it has.
        """
        if (most := self.most(out, into)) is not None and self.r > most:
            raise SettingError(
                "model.adapter.r",
                f"{name} is {out} x {into}, and {plugins.called(type(self))} has r of at most {most} there: "
                "lower it",
            )

    def adopt(self, layout: Layout, drawn: Mapping[str, Tensor], saved: Saved) -> Adapter:
        """The tensors of its `parts` that make the change of an ordinary LoRA of the same base.

        Args:
            layout: of the adapter.
            drawn: the first values that the seed stands for.
            saved: what `export` wrote, or peft.

        Raises:
            SettingError: it is of other layers or another rank, or the kind cannot.
        """
        raise SettingError(
            "model.start", f"adapters of kind {plugins.called(type(self))} begin from the seed alone"
        )

    def owner(self, name: str) -> str | None:
        """The layer that a tensor of a saved adapter is of; empty: all of them; None: a head's."""
        return layer_of(name) if ".lora_" in name else None

    def scaling(self, rank: int | None = None) -> float:
        """The factor before the change that a client of that rank has; by default the server's: `alpha / rank`.

        Under `rslora` it is `alpha / sqrt(rank)`.
        """
        rank = rank or self.r
        return self.alpha / (rank**0.5 if self.rslora else rank)

    @classmethod
    def options(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields of the class that options of a scenario stand for; by default those of their names."""
        return given

    def saved_as(self, config: Any, rank: int | None) -> Any:
        """The configuration that peft reads beside what `export` gives.

        Args:
            config: that of the wrapped model.
            rank: that `export` gave.
        """
        return config if rank is None else replace(config, r=rank, lora_alpha=rank, use_rslora=False)

    def trains(self, role: str) -> bool:
        """Whether tensors of a role can train; the others stay as they were first made."""
        return self.parts.get(role, HEAD).trains

    def counts(self, role: str) -> bool:
        """Whether the change grows in proportion to tensors of a role, all else being as it was first made."""
        return role in self.parts and self.parts[role].origin == "zero"

    def federates(self, parameter: str) -> bool:
        """Whether a parameter of a wrapped model is one of the adapter's, or of a head's."""
        return "lora_" in parameter or ".modules_to_save." in parameter

    def held(self, model: Any) -> dict[str, Any]:
        """The layers of a wrapped model that have a change, by name; each has `get_base_layer()`."""
        return {layer_of(public(n)): m for n, m in model.named_modules() if hasattr(m, "lora_A")}

    def rescale(self, layer: Any, rank: int) -> None:
        """Let a layer be that of a client of some rank."""
        layer.scaling["default"] = self.scaling(rank)

    @contextlib.contextmanager
    def off(self, layers: Collection[Any]) -> Iterator[None]:
        """Have layers be those of the base alone for a while."""
        before = [layer.scaling["default"] for layer in layers]
        try:
            for layer in layers:
                layer.scaling["default"] = 0.0
            yield
        finally:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling["default"] = scaling

    def export(
        self, layout: Layout, adapter: Mapping[str, Tensor], merged: Change | None = None
    ) -> tuple[Adapter, int | None]:
        """The same as an ordinary LoRA of the untouched base.

        Args:
            layout: of the adapter.
            adapter: every tensor of the layout, perhaps of a lower rank.
            merged: all that was folded into the base, scaling included; it becomes part of the adapter.

        Returns:
            Tensors by peft's names, and the rank, which then is `lora_alpha` too; None: as the kind's own.
        """
        whole = all(tensor.shape == layout[name].shape for name, tensor in adapter.items())
        if self.ordinary and whole and not merged and self.scaling() == Kind.scaling(self):
            return {n: t for n, t in adapter.items() if layout[n].role in (*self.parts, "head")}, None
        plain: dict[str, factors.Factors] = {}
        for name, change in self.lazy(layout, adapter).items():
            more = [(1.0, Thin(*merged[name]))] if merged and name in merged else []
            both = Total([(self.scaling(), change), *more])
            plain[name] = factors.shorten(*both.factors()) if both.thin else both.factors()
        rank = max(1, *(right.shape[0] for _, right in plain.values()))
        if larger := [n for n, (b, a) in plain.items() if rank * (len(b) + a.shape[1]) > len(b) * a.shape[1]]:
            logger.warning(
                "the adapter is a LoRA of rank %d, which has more numbers than the weights that it changes, such "
                "as %s; fedlora export --merge writes these instead",
                rank,
                larger[0],
            )
        tensors = {n: t for n, t in adapter.items() if layout[n].role == "head"}
        for name, (left, right) in plain.items():
            pad = rank - right.shape[0]
            tensors[f"{PREFIX}{name}.lora_A.weight"] = np.pad(right, ((0, pad), (0, 0))).astype(np.float32)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = np.pad(left, ((0, 0), (0, pad))).astype(np.float32)
        return tensors, rank


def initial(
    kind: Kind,
    layout: Layout,
    seed: int,
    *,
    weights: Weights | None = None,
    held: Mapping[str, Tensor] | None = None,
    draw: int = 0,
) -> Adapter:
    """The adapter that a seed stands for: bit-identical wherever it is drawn, so it need not travel.

    Args:
        kind: of the adapter.
        layout: the tensors to make.
        seed: what they are drawn from.
        weights: the frozen weights, for kinds that begin from them.
        held: tensors of the heads that the base brings along, and are not drawn.
        draw: a further draw of what the seed gives; heads have only one.
    """
    adapter: Adapter = {}
    for name in sorted(layout):
        if held and name in held:
            adapter[name] = held[name].copy()
            continue
        part = kind.parts.get(layout[name].role)
        again = (draw,) if draw and part is not None and part.origin == "seeded" else ()
        drawn_by = generator(seed, "adapter", kind.stream(layout[name]), *again)
        adapter[name] = kind.initial(layout[name], drawn_by, weights)
    return adapter


def take_over(kind: Kind, layout: Layout, drawn: Mapping[str, Tensor], saved: Saved) -> Adapter:
    """All that an adapter takes over from a saved one; the rest is as it is drawn.

    Raises:
        SettingError: it is of other layers, another rank or another head.
    """
    owners = {name: kind.owner(name) for name in saved.tensors}
    heads = {name: t for name, t in saved.tensors.items() if owners[name] is None}
    for name, tensor in heads.items():
        if name not in layout:
            inside = name.removeprefix(PREFIX)
            hint = "model.pooler: trained" if ".pooler." in name else "a model with the same head"
            raise SettingError("model.start", f"it trained {inside}, which this run does not: take {hint}")
        if tensor.shape != layout[name].shape:
            raise SettingError("model.start", f"its {name} is {tensor.shape}, and this run's {layout[name].shape}")
    taken = kind.adopt(layout, drawn, saved)
    has = {owner for owner in owners.values() if owner}
    if more := sorted(has - {slot.module for slot in layout.values()}):
        raise SettingError(
            "model.start", f"it has factors for {more[0]} too: set model.adapter.targets and layers to its own"
        )
    return {**taken, **heads}


def load(
    use: str,
    r: int,
    alpha: float,
    targets: tuple[str, ...],
    layers: tuple[int, ...] | None,
    exclude: tuple[str, ...] = (),
    rslora: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Kind:
    """The kind that a scenario names, with options of its own.

    Raises:
        SettingError: nothing importable has that name, or an option is wrong.
    """
    cls: type[Kind] = plugins.find_of("kinds", use, Kind)  # type: ignore[type-abstract]
    options = cls.options(options or {})
    key, known = "model.adapter.kind", {f.name for f in fields(cls)} - {f.name for f in fields(Kind)}
    for name in options:
        if name not in known:
            hint = suggestion(name, sorted(known)) if known else "it takes none"
            raise SettingError(f"{key}.{name}", f"{use} has no option {name!r}: {hint}")
    try:
        return cls(r, alpha, targets, layers, exclude, rslora, **options)
    except (TypeError, ValueError) as error:
        raise SettingError(key, f"{use}: {error}") from error


def public(parameter: str) -> str:
    """Peft's name of a tensor in a saved adapter."""
    return parameter.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to, by the tensor's public name."""
    return name.removeprefix(PREFIX).split(".lora_")[0].rsplit(".weight", 1)[0].rsplit(".bias", 1)[0]


def under(name: str, module: str) -> bool:
    """Whether a name is that of something inside a module."""
    return f".{module}." in f".{name}"


def first_of_head(slot: Slot, rng: np.random.Generator) -> Tensor:
    """The first value of a tensor of a head: normal(0, 0.02), a bias zero."""
    if len(slot.shape) > 1:
        return rng.normal(0.0, 0.02, slot.shape).astype(np.float32)
    return np.zeros(slot.shape, np.float32)


def modules_of(layout: Layout, role: str) -> Iterator[tuple[str, str]]:
    """Of each tensor of a role its layer and its name."""
    for name, slot in layout.items():
        if slot.role == role:
            yield slot.module, name
