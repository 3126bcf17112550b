"""The adapter: the named low-rank tensors (and head) that federate, as plain data.

Names are those of peft's state dict, so that an adapter on disk is what `PeftModel.from_pretrained`
reads. A *kind* says, in one place, what it builds and what the tensors are for; strategies read the
`role` of a slot and nothing else assumes tensors called A and B.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fedlora import factors
from fedlora.errors import ContractError, SettingError
from fedlora.factors import Factors
from fedlora.privacy.replay import Drawn
from fedlora.seeding import generator

if TYPE_CHECKING:
    import torch

Tensor = NDArray[np.float32]
Adapter = dict[str, Tensor]
Change = Mapping[str, Factors]
"""Of each layer, a change of its weight as thin factors (out x m, m x in)."""
PREFIX = "base_model.model."
"""What peft puts before the names of a model's own modules."""
Weights = Callable[[str], "torch.Tensor"]
"""The frozen weight (out x in) of a layer, by its name."""


@dataclass(frozen=True)
class Slot:
    """One tensor of an adapter: what it is, not what it holds."""

    name: str
    shape: tuple[int, ...]
    role: str  # "A" (r x in) or "B" (out x r) of a LoRA pair, "core" (r x r) between them, or "head"
    module: str  # the layer it belongs to
    trainable: bool = True  # False: stays as the seed made it, whatever a strategy asks


Layout = Mapping[str, Slot]


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one client sends back, or the weighted mean of several when they were summed on the way.

    Attributes:
        adapter: the tensors sent; for several clients their mean, each weighted by its own weight.
        weight: of this update in a mean; for several clients the sum of theirs.
        clients: whose work this is, ascending.
        scaling: the client's own factor before `B @ A`, which its rank makes.
        metrics: figures that the clients chose to share, such as `train_loss`.
        state: of the client's optimiser, by tensor and name; it stays with the client, and never travels.
    """

    adapter: Adapter
    weight: float
    clients: tuple[int, ...]
    scaling: float = 1.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: Adapter = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """What the server asks of every client of a round.

    Attributes:
        round: from 1.
        adapter: the tensors sent down; the others are what the seed, or the client, made of them.
        train: names of the tensors to train.
        send: names of the tensors to send back.
        keep: names of the tensors that stay with the client from one of its rounds to the next.
        config: further words of the strategy to the client, such as `proximal-mu`.
        frozen: the fingerprint of the tensors that are not sent down because the seed gives them; a
            client whose own differ refuses. Empty: not checked.
        ranked: what clients of a rank below the server's receive instead of `adapter`, by rank.
        draw: which draw of the seed the tensors that are not sent down start from; 0 is the first.
        trip: from 1; in the later trips of a round clients answer about what they trained in the first.
        steps: how many local steps a client takes that takes fewer than the scenario says; simulated worlds only.
        drawn: what clients, and under None the server, drew noise for in this round before; where it runs again.
    """

    round: int
    adapter: Adapter
    train: tuple[str, ...]
    send: tuple[str, ...]
    keep: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    frozen: str = ""
    ranked: Mapping[int, Adapter] = field(default_factory=dict)
    draw: int = 0
    trip: int = 1
    steps: Mapping[int, int] = field(default_factory=dict)
    drawn: Mapping[int | None, Drawn] = field(default_factory=dict)

    def at(self, rank: int) -> "Instruction":
        """The same as a client of that rank gets it."""
        return replace(self, adapter=self.ranked.get(rank, self.adapter), ranked={})


class Kind(Protocol):
    """A way to build an adapter into a model."""

    ordinary: ClassVar[bool]
    """Whether its tensors are what peft's LoRA has, so that they are saved as they are."""

    @property
    def r(self) -> int:
        """The server's rank."""

    def wrap(self, model: Any, heads: Sequence[str], task_type: str | None) -> Any:
        """The model with the adapter in it, as a `peft.PeftModel`."""

    def role(self, name: str) -> str:
        """What the tensor of that name is for."""

    def trains(self, role: str) -> bool:
        """Whether tensors of a role can train; the others stay as they were first made."""

    def initial(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """The first value of a tensor, from `rng` and the frozen weights alone."""

    def scaling(self, rank: int | None = None) -> float:
        """The factor before the change that a client of that rank has; by default the server's."""

    def shape(self, slot: Slot, rank: int) -> tuple[int, ...]:
        """The shape of a tensor at a client of that rank."""

    def change(self, layout: Layout, adapter: Mapping[str, Tensor]) -> Change:
        """What an adapter stands for, without the scaling: thin factors of each layer's change."""


@dataclass(frozen=True)
class Lora:
    """LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685): a weight's change is `alpha / r * B @ A`."""

    ordinary: ClassVar[bool] = True

    r: int
    alpha: float
    targets: tuple[str, ...]
    layers: tuple[int, ...] | None = None  # of the model, from 0, that have targets; None: all

    def scaling(self, rank: int | None = None) -> float:
        """`alpha / rank`."""
        return self.alpha / (rank or self.r)

    def shape(self, slot: Slot, rank: int) -> tuple[int, ...]:
        """A loses rows and B columns."""
        cut = {"A": (rank, *slot.shape[1:]), "B": (*slot.shape[:1], rank)}
        return cut.get(slot.role, slot.shape)

    def change(self, layout: Layout, adapter: Mapping[str, Tensor]) -> Change:
        """B and A of each layer."""
        return {layout[b].module: (adapter[b], adapter[a]) for b, a in pairs(layout)}

    def wrap(self, model: Any, heads: Sequence[str], task_type: str | None) -> Any:
        """Put factors beside every linear layer whose name ends in one of the targets.

        Raises:
            SettingError: a target matches no linear layer, or one of the layers is not there.
        """
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        # A head federates whole: no factors inside it, whatever the targets say.
        inside = [n for n, _ in model.named_modules() if any(f".{head}." in f".{n}." for head in heads)]
        layers = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
        layers = [n for n in layers if n not in inside]
        for target in self.targets:
            if not any(_ends(name, (target,)) for name in layers):
                known = sorted({name.rsplit(".", 1)[-1] for name in layers})
                raise SettingError(
                    "model.adapter.targets",
                    f"{target!r} matches no linear layer of the model; its layers are {known}",
                )
        for layer in self.layers or ():
            if not any(f".{layer}." in f".{name}" and _ends(name, self.targets) for name in layers):
                raise SettingError("model.adapter.layers", f"no layer {layer} with targets; the first is 0")
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # peft multiplies by it, so a float is right
            lora_dropout=0.0,
            target_modules=list(self.targets),
            layers_to_transform=None if self.layers is None else list(self.layers),
            exclude_modules=inside or None,
            modules_to_save=list(heads) or None,
            task_type=task_type,
        )
        with warnings.catch_warnings():  # peft 0.21 asks transformers 5 by an old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings", UserWarning)  # untied to be merged
            return get_peft_model(model, config)

    def role(self, name: str) -> str:
        """`A`, `B` or `head`."""
        if ".lora_A." in name:
            return "A"
        return "B" if ".lora_B." in name else "head"

    def trains(self, role: str) -> bool:
        """All of them."""
        return True

    def initial(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """A uniform on +-1/sqrt(in) as peft draws it, B zero, head normal(0, 0.02) with zero bias."""
        if slot.role == "A":
            bound = slot.shape[1] ** -0.5  # kaiming_uniform with a = sqrt(5), as in peft and in the LoRA code
            return rng.uniform(-bound, bound, slot.shape).astype(np.float32)
        if slot.role == "head" and len(slot.shape) > 1:
            return rng.normal(0.0, 0.02, slot.shape).astype(np.float32)
        return np.zeros(slot.shape, np.float32)


def _ends(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


@dataclass(frozen=True)
class LoraXS(Lora):
    """LoRA-XS (Balazy et al., 2024, https://arxiv.org/abs/2405.17604): only an r x r core trains.

    A weight's change is `alpha / r * B @ R @ A`, with the orthonormal B (out x r) and A (r x in) the first
    singular vectors of the frozen weight itself, and R zero at first. They come from the base model, so
    that only r^2 numbers a layer train and travel, and the change is linear in them.
    """

    ordinary: ClassVar[bool] = False

    def wrap(self, model: Any, heads: Sequence[str], task_type: str | None) -> Any:
        """As LoRA, with R between A and B."""
        import torch

        wrapped = super().wrap(model, heads, task_type)
        for name, module in list(wrapped.named_modules()):
            if name.endswith(".lora_B"):
                core = torch.nn.Linear(self.r, self.r, bias=False)
                module["default"] = torch.nn.Sequential(core, module["default"])
        return wrapped

    def role(self, name: str) -> str:
        """`A`, `B`, `core` or `head`."""
        role = super().role(name)
        return "core" if role == "B" and name.endswith(".0.weight") else role

    def trains(self, role: str) -> bool:
        """The core and the head."""
        return role in ("core", "head")

    def shape(self, slot: Slot, rank: int) -> tuple[int, ...]:
        """The core loses rows and columns."""
        return (rank, rank) if slot.role == "core" else super().shape(slot, rank)

    def change(self, layout: Layout, adapter: Mapping[str, Tensor]) -> Change:
        """B R and A of each layer."""
        cores = {slot.module: name for name, slot in layout.items() if slot.role == "core"}
        plain = super().change(layout, adapter)
        return {module: (b @ adapter[cores[module]], a) for module, (b, a) in plain.items()}

    def initial(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """Singular vectors for A and B, zero for the core.

        Raises:
            SettingError: a layer has fewer than r of them.
        """
        import torch

        if slot.role not in ("A", "B") or weights is None:
            return super().initial(slot, rng, weights)
        weight = weights(slot.module).detach().double().cpu()
        if self.r > min(weight.shape):
            raise SettingError(
                "model.adapter.r",
                f"{slot.module} is {weight.shape[0]} x {weight.shape[1]} and has no {self.r} singular vectors; "
                f"take r of at most {min(weight.shape)}",
            )
        u, _, vt = torch.linalg.svd(weight, full_matrices=False)
        u, vt = u[:, : self.r], vt[: self.r]
        sign = vt.gather(1, vt.abs().argmax(1, keepdim=True)).sign()  # (r, 1): an SVD leaves it open
        found: torch.Tensor = vt * sign if slot.role == "A" else u * sign.T
        return found.float().contiguous().numpy()


KINDS: Mapping[str, type[Lora]] = {"lora": Lora, "lora_xs": LoraXS}


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
        draw: a further draw for A; heads have only one.
    """
    adapter: Adapter = {}
    for name in sorted(layout):
        if held and name in held:
            adapter[name] = held[name].copy()
            continue
        again = (draw,) if draw and layout[name].role == "A" else ()
        adapter[name] = kind.initial(layout[name], generator(seed, "adapter", name, *again), weights)
    return adapter


def fingerprint(adapter: Mapping[str, Tensor]) -> str:
    """Differs when any bit of any tensor does."""
    digest = hashlib.sha256()
    for name in sorted(adapter):
        digest.update(name.encode() + adapter[name].tobytes())
    return digest.hexdigest()[:16]


class Sum:
    """A running sum of updates, each times its weight, in the order they are added; it holds one adapter."""

    def __init__(self) -> None:
        self.first: Update | None = None
        self.total: Adapter = {}
        self.weight = 0.0
        self.clients: list[int] = []
        self.metrics: dict[str, float] = {}
        self._part: Adapter = {}

    def add(self, update: Update) -> None:
        """One more; only the first is held on to.

        Raises:
            ContractError: it has other tensors than those before it.
        """
        if self.first is None:
            self.first = update
            self.metrics = {name: update.weight * value for name, value in update.metrics.items()}
        else:
            if self.first.adapter.keys() != update.adapter.keys():
                raise ContractError(f"clients {update.clients} sent other tensors than those before them")
            if not self.total:
                weight = np.float32(self.first.weight)
                self.total = {name: tensor * weight for name, tensor in self.first.adapter.items()}
                self._part = {name: np.empty_like(tensor) for name, tensor in self.total.items()}
            weight = np.float32(update.weight)
            for name, tensor in update.adapter.items():
                self.total[name] += np.multiply(tensor, weight, out=self._part[name])
            shared = self.metrics.keys() & update.metrics.keys()
            self.metrics = {k: self.metrics[k] + update.weight * update.metrics[k] for k in shared}
        self.weight += update.weight
        self.clients += update.clients

    def mean(self) -> Adapter:
        """`sum_k w_k x_k / sum_k w_k` for every tensor; of one update a copy, bit for bit.

        Raises:
            ContractError: nothing was added, or weights do not sum to something positive.
        """
        if self.first is None or not self.weight > 0:
            raise ContractError("no update to average, or weights that do not sum to something positive")
        if not self.total:
            return {name: tensor.copy() for name, tensor in self.first.adapter.items()}
        return {name: tensor / np.float32(self.weight) for name, tensor in self.total.items()}

    def updates(self) -> list[Update]:
        """What was added as one update that stands for all of it, or none where nothing was."""
        if self.first is None or not self.total:
            return [self.first] if self.first else []
        metrics = {name: self.metrics[name] / self.weight for name in sorted(self.metrics)}
        clients = tuple(self.clients)
        return [replace(self.first, adapter=self.mean(), weight=self.weight, clients=clients, metrics=metrics)]


def weighted_mean(updates: Iterable[Update]) -> Adapter:
    """`sum_k w_k x_k / sum_k w_k` for every tensor, in the order given.

    Raises:
        ContractError: there is no update, weights do not sum to something positive, or keys differ.
    """
    total = Sum()
    for update in updates:
        total.add(update)
    return total.mean()


def pairs(layout: Layout) -> Iterator[tuple[str, str]]:
    """The names of B and A of each LoRA pair."""
    a_of = {slot.module: name for name, slot in layout.items() if slot.role == "A"}
    for name, slot in layout.items():
        if slot.role == "B":
            yield name, a_of[slot.module]


def names(layout: Layout, module: str) -> tuple[str, str]:
    """The names of B and A of a layer."""
    return next((b, a) for b, a in pairs(layout) if layout[b].module == module)


def shares(
    kind: Kind, layout: Layout, held: Mapping[str, Tensor], updates: Sequence[Update]
) -> dict[str, list[tuple[float, NDArray[np.floating], NDArray[np.floating]]]]:
    """The terms `p_k s_k`, B_k and A_k of the average change of each layer, for `factors.stack`.

    Args:
        kind: of the adapter.
        layout: says which tensors pair up.
        held: stands in for tensors that clients did not send.
        updates: one for each client.
    """
    total = sum(u.weight for u in updates)
    parts: dict[str, list[tuple[float, NDArray[np.floating], NDArray[np.floating]]]] = {}
    for update in updates:
        for module, pair in kind.change(layout, {**held, **update.adapter}).items():
            parts.setdefault(module, []).append((update.weight / total * update.scaling, *pair))
    return parts


def mean_head(layout: Layout, updates: Sequence[Update]) -> Adapter:
    """The weighted mean of the tensors of the head alone."""
    heads = [
        replace(u, adapter={n: t for n, t in u.adapter.items() if n in layout and layout[n].role == "head"})
        for u in updates
    ]
    return weighted_mean(heads)


def aggregation_error(
    layout: Layout,
    sent: Mapping[str, Tensor],
    updates: Sequence[Update],
    after: Mapping[str, Tensor],
    *,
    kind: Kind = Lora(1, 1.0, ()),
    merge: Change | None = None,
) -> float:
    """How far the aggregate is from averaging the full weight changes.

    `|| s_hat B_hat A_hat + merge - ideal ||_F / || ideal ||_F`, over all layers together, with
    `ideal = sum_k p_k s_k B_k A_k`. Computed through QR of the stacked thin factors, in float64.

    Args:
        layout: says which tensors pair up.
        sent: what the clients started from; stands in for factors that they did not send.
        updates: one for each client.
        after: what the strategy made of them, over all tensors of `sent`.
        kind: of the adapter; by default LoRA with a scaling of 1.
        merge: what the strategy folded into the base in the same round.

    Returns:
        The error, 0 where the ideal change is 0.
    """
    ideal = wrong = 0.0
    made = kind.change(layout, after)
    for module, parts in shares(kind, layout, sent, updates).items():
        ideal += factors.norm(*factors.stack(parts)) ** 2
        parts.append((-kind.scaling(), *made[module]))
        if merge and module in merge:
            parts.append((-1.0, *merge[module]))
        wrong += factors.norm(*factors.stack(parts)) ** 2
    return float(np.sqrt(wrong / ideal)) if ideal > 0 else 0.0
