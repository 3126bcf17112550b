"""The adapter: the named low-rank tensors (and head) that federate, as plain data.

Names are those of peft's state dict, so that an adapter on disk is what `PeftModel.from_pretrained`
reads. A *kind* says, in one place, what it builds and what the tensors are for; strategies read the
`role` of a slot and nothing else assumes tensors called A and B.
"""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import ContractError, SettingError
from fedlora.seeding import derive

if TYPE_CHECKING:
    import torch

Tensor = NDArray[np.float32]
Adapter = dict[str, Tensor]


@dataclass(frozen=True)
class Slot:
    """One tensor of an adapter: what it is, not what it holds."""

    name: str
    shape: tuple[int, ...]
    role: str  # "A" (r x in) or "B" (out x r) of a LoRA pair, or "head"
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
        metrics: figures that the clients chose to share, such as `train_loss`.
    """

    adapter: Adapter
    weight: float
    clients: tuple[int, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """What the server asks of every client of a round.

    Attributes:
        round: from 1.
        adapter: the tensors sent down; the others are what the seed, or the client, made of them.
        train: names of the tensors to train.
        send: names of the tensors to send back.
        config: further words of the strategy to the client, such as `proximal-mu`.
        frozen: the fingerprint of the tensors that are not sent down because the seed gives them; a
            client whose own differ refuses. Empty: not checked.
    """

    round: int
    adapter: Adapter
    train: tuple[str, ...]
    send: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    frozen: str = ""


class Kind(Protocol):
    """A way to build an adapter into a model."""

    def wrap(self, model: Any, heads: Sequence[str], task_type: str) -> Any:
        """The model with the adapter in it, as a `peft.PeftModel`."""

    def role(self, name: str) -> str:
        """What the tensor of that name is for."""

    def initial(self, slot: Slot, generator: "torch.Generator") -> "torch.Tensor":
        """The first value of a tensor, drawn from `generator` alone."""

    @property
    def scaling(self) -> float:
        """The factor before `B @ A`."""


@dataclass(frozen=True)
class Lora:
    """LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685): a weight's change is `alpha / r * B @ A`."""

    r: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scaling(self) -> float:
        """`alpha / r`."""
        return self.alpha / self.r

    def wrap(self, model: Any, heads: Sequence[str], task_type: str) -> Any:
        """Put factors beside every linear layer whose name ends in one of the targets.

        Raises:
            SettingError: a target matches no linear layer.
        """
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        # A head federates whole: no factors inside it, whatever the targets say.
        inside = [n for n, _ in model.named_modules() if any(f".{head}." in f".{n}." for head in heads)]
        layers = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
        layers = [n for n in layers if n not in inside]
        for target in self.targets:
            if not any(name == target or name.endswith(f".{target}") for name in layers):
                known = sorted({name.rsplit(".", 1)[-1] for name in layers})
                raise SettingError(
                    "model.adapter.targets",
                    f"{target!r} matches no linear layer of the model; its layers are {known}",
                )
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # peft multiplies by it, so a float is right
            lora_dropout=0.0,
            target_modules=list(self.targets),
            exclude_modules=inside or None,
            modules_to_save=list(heads) or None,
            task_type=task_type,
        )
        with warnings.catch_warnings():  # peft 0.21 asks transformers 5 by an old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            return get_peft_model(model, config)

    def role(self, name: str) -> str:
        """`A`, `B` or `head`."""
        if ".lora_A." in name:
            return "A"
        return "B" if ".lora_B." in name else "head"

    def initial(self, slot: Slot, generator: "torch.Generator") -> "torch.Tensor":
        """A uniform on +-1/sqrt(in) as peft draws it, B zero, head normal(0, 0.02) with zero bias."""
        import torch

        tensor = torch.zeros(slot.shape)
        if slot.role == "A":
            bound = slot.shape[1] ** -0.5  # kaiming_uniform with a = sqrt(5), as in peft and in the LoRA code
            tensor.uniform_(-bound, bound, generator=generator)
        elif slot.role == "head" and tensor.dim() > 1:
            tensor.normal_(0.0, 0.02, generator=generator)
        return tensor


def initial(kind: Kind, layout: Layout, seed: int) -> Adapter:
    """The adapter that a seed stands for: bit-identical wherever it is drawn, so it need not travel."""
    import torch

    adapter: Adapter = {}
    for name in sorted(layout):
        generator = torch.Generator().manual_seed(derive(seed, "adapter", name))
        adapter[name] = kind.initial(layout[name], generator).numpy()
    return adapter


def fingerprint(adapter: Mapping[str, Tensor]) -> str:
    """Differs when any bit of any tensor does."""
    digest = hashlib.sha256()
    for name in sorted(adapter):
        digest.update(name.encode() + adapter[name].tobytes())
    return digest.hexdigest()[:16]


def weighted_mean(updates: Iterable[Update]) -> Adapter:
    """`sum_k w_k x_k / sum_k w_k` for every tensor, in the order given.

    Raises:
        ContractError: there is no update, weights do not sum to something positive, or keys differ.
    """
    total: Adapter = {}
    weight = 0.0
    for update in updates:
        if total and total.keys() != update.adapter.keys():
            raise ContractError(f"clients {update.clients} sent other tensors than those before them")
        for name, tensor in update.adapter.items():
            part = tensor * np.float32(update.weight)
            if name in total:
                total[name] += part
            else:
                total[name] = part
        weight += update.weight
    if not weight > 0:
        raise ContractError("no update to average, or weights that do not sum to something positive")
    return {name: tensor / np.float32(weight) for name, tensor in total.items()}


def pairs(layout: Layout) -> Iterator[tuple[str, str]]:
    """The names of B and A of each LoRA pair."""
    a_of = {slot.module: name for name, slot in layout.items() if slot.role == "A"}
    for name, slot in layout.items():
        if slot.role == "B":
            yield name, a_of[slot.module]


def aggregation_error(
    layout: Layout, sent: Mapping[str, Tensor], updates: Sequence[Update], after: Mapping[str, Tensor]
) -> float:
    """How far the aggregate is from averaging the full weight changes.

    `|| B_hat A_hat - sum_k p_k B_k A_k ||_F / || sum_k p_k B_k A_k ||_F`, over all pairs together; the
    common scaling cancels. Computed through QR of the stacked thin factors, in float64.

    Args:
        layout: says which tensors pair up.
        sent: what the clients started from; stands in for factors that they did not send.
        updates: one for each client.
        after: what the strategy made of them, over all tensors of `sent`.

    Returns:
        The error, 0 where the ideal change is 0.
    """
    weights = np.array([u.weight for u in updates])
    shares = weights / weights.sum()
    held = [{**sent, **u.adapter} for u in updates]
    wrong = ideal = 0.0
    for name_b, name_a in pairs(layout):
        left = [p * tensors[name_b].astype(np.float64) for p, tensors in zip(shares, held, strict=True)]
        right = [tensors[name_a].astype(np.float64) for tensors in held]
        ideal += _product_norm(left, right) ** 2
        left.append(-after[name_b].astype(np.float64))
        right.append(after[name_a].astype(np.float64))
        wrong += _product_norm(left, right) ** 2
    return float(np.sqrt(wrong / ideal)) if ideal > 0 else 0.0


def _product_norm(left: Sequence[NDArray[np.float64]], right: Sequence[NDArray[np.float64]]) -> float:
    """`|| sum_i left_i right_i ||_F` for left_i (out x r) and right_i (r x in), without any out x in matrix."""
    upper_left = np.linalg.qr(np.concatenate(left, axis=1)).R  # (min(out, R), R)
    upper_right = np.linalg.qr(np.concatenate(right, axis=0).T).R  # (min(in, R), R)
    return float(np.linalg.norm(upper_left @ upper_right.T))
