"""Kinds of peft's own, where the change is linear in what trains: one file for all of them.

    W' = W + alpha / r * M(theta),   theta zero at first, M linear and the same everywhere

M is what peft's own layer adds; it is built beside the model, from a stand-in that has the shapes of the layers
and no weights. theta is the tensor named in `LINEAR`, and all else of the kind stays as its seed draws it:

    MissConfig       a block that inputs share                https://arxiv.org/abs/2409.15371
    FourierFTConfig  coefficients of a Fourier transform      https://arxiv.org/abs/2405.03003
    WaveFTConfig     coefficients of wavelets                 https://arxiv.org/abs/2505.12532
    C3AConfig        kernels of circular convolutions         https://arxiv.org/abs/2407.19342
    ShiraConfig      values at places of a seeded mask        https://arxiv.org/abs/2406.13175
    VeraConfig       b of diag(b) B diag(d) A, with d as is   https://arxiv.org/abs/2310.11454
    RandLoraConfig   lambda of sum_i B_i L_i A_i G_i          https://arxiv.org/abs/2502.00987

With theta alone `sum_k p_k M(theta_k) = M(sum_k p_k theta_k)`. That is measured as a model is wrapped, not taken
on trust. In the others of peft's kinds an average is off, or the change cannot be told without W
(`docs/kinds.md`). An export is an adapter of that kind, in peft's names, with alpha / r in theta.
"""

import logging
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import lru_cache, partial
from typing import Any, ClassVar

import numpy as np

from fedlora.adapter import Adapter, Change, Layout, Slot, Tensor
from fedlora.errors import SettingError, cut, suggestion
from fedlora.kinds.contract import PREFIX, Facts, Gradients, Part, Saved, Weights, modules_of
from fedlora.kinds.frames import rounded
from fedlora.kinds.lora import Lora
from fedlora.lazy import Lazy, Whole
from fedlora.seeding import generator

LINEAR: Mapping[str, str] = {
    "MissConfig": "miss_block",
    "FourierFTConfig": "fourierft_spectrum",
    "WaveFTConfig": "waveft_spectrum",
    "C3AConfig": "c3a_kernel",
    "ShiraConfig": "shira_weight",
    "VeraConfig": "vera_lambda_b",
    "RandLoraConfig": "randlora_lambda",
}
"""Of each configuration the tensor that trains."""
OURS = (
    "target_modules",
    "layers_to_transform",
    "layers_pattern",
    "exclude_modules",
    "modules_to_save",
    "task_type",
)
EXACT = 1e-4
"""The error of an average, relative to it, from which a kind is refused."""
_PLACES = 6  # of a change that stand for all of it where two sites compare theirs
_PROBES = 64
_SAID = 200  # characters of what peft says
_UNSEEDED = {"ShiraConfig": {"random_seed": 0}}  # where peft draws anew for each process

Sizes = tuple[tuple[str, int, int], ...]
"""Of each layer its name, outputs and inputs."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peft(Lora):
    """A kind of peft's own that is linear in one tensor, such as MiSS: `config` names its configuration."""

    parts: ClassVar[Mapping[str, Part]] = {"values": Part("zero", True), "frame": Part("derived", False)}
    ordinary: ClassVar[bool] = False
    thin: ClassVar[bool] = False
    gradients: ClassVar[Gradients] = "hooks"
    facts: ClassVar[Facts] = Facts("theta, as the config says", "s norm(M)")

    config: str = "MissConfig"
    """A class of peft, one of `LINEAR`."""
    told: tuple[tuple[str, Any], ...] = ()
    """What it is given, beside the layers and, where it has one, the rank."""
    layers_of: dict[str, tuple[int, int]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Of each layer of the model that was wrapped its outputs and inputs."""

    def __post_init__(self) -> None:
        """Refuse configurations whose average is off.

        Raises:
            ValueError: it is none of `LINEAR`.
        """
        if not isinstance(self.config, str) or self.config not in LINEAR:
            if near := get_close_matches(str(self.config), LINEAR, n=1, cutoff=0.9):
                raise ValueError(f"unknown configuration {self.config!r}: did you mean {near[0]!r}?")
            raise ValueError(
                f"config {self.config!r} is not one of those that average exactly: {', '.join(LINEAR)}"
            )
        if ours := [name for name, _ in self.told if name in OURS]:
            raise ValueError(f"{ours[0]} is said by model.adapter.targets, layers and exclude")

    @classmethod
    def options(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """All but `config` goes to peft; or what a saved configuration says that is the kind's own."""
        if "peft_type" in given:
            name = next((n for n in LINEAR if n.lower() == f"{given['peft_type']}config".lower()), "")
            known = _known(name) if name else set()
            given = {"config": name, **{k: v for k, v in given.items() if k in known and k != "r"}}
        frozen = ((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(given.items()) if k != "config")
        return {"told": tuple(frozen), **{k: v for k, v in given.items() if k == "config"}}

    def stand_in(self, sizes: Sizes, device: Any = "cpu") -> Mapping[str, "_Layer"]:
        """The layers of a model of these sizes, as peft builds them."""
        return _stand_in(self.config, self.r, self.told, sizes, str(device))

    def wrap(self, model: Any, heads: Sequence[str], task_type: str | None) -> Any:
        """As LoRA, with peft's own map in the place of A and B.

        Raises:
            SettingError: as LoRA's; or peft refuses the configuration, or an average would be off.
        """
        import torch

        from fedlora.kinds.modules import Mapped, Through

        wrapped = super().wrap(model, heads, task_type)
        held = self.held(wrapped)
        self.layers_of.clear()
        for name, layer in held.items():
            self.layers_of[name] = (layer.lora_B["default"].out_features, layer.lora_A["default"].in_features)
        made = self.stand_in(self.sizes)
        for name, layer in held.items():
            layer.lora_A["default"] = Through()
            layer.lora_B["default"] = Mapped(partial(self._changed, name), made[name].shape, _PLACES)
        error = made[next(iter(held))].error()
        logger.info("%s: an average of %s is off by %.1e", self.config, LINEAR[self.config], error)
        if not error < EXACT or not all(torch.isfinite(layer.change(None)).all() for layer in made.values()):
            raise SettingError(
                "model.adapter.kind",
                f"{self.config} as it is set is not linear in {LINEAR[self.config]} (off by {error:.1e})",
            )
        return wrapped

    @property
    def sizes(self) -> Sizes:
        """Those of the model that was wrapped."""
        return tuple((name, *size) for name, size in self.layers_of.items())

    def _changed(self, name: str, theta: Any) -> Any:
        return self.stand_in(self.sizes, theta.device)[name].change(theta)

    def role(self, name: str) -> str:
        """`values`, `frame` or `head`."""
        last = name.rpartition(".")[2]
        return last if ".lora_B." in name and last in self.parts else "head"

    def shape(self, slot: Slot, rank: int) -> tuple[int, ...]:
        """The same at every rank."""
        return slot.shape

    def beside(self, role: str, out: int, into: int) -> tuple[int, ...]:
        """As peft builds it beside such a layer."""
        return (_PLACES,) if role == "frame" else self._alone(out, into).shape

    def numbers(self, out: int, into: int) -> int:
        """Those of theta."""
        if self.config == "MissConfig":  # so that lists need not build one
            return int(dict(self.told).get("r", self.r)) * out
        return super().numbers(out, into)

    def _alone(self, out: int, into: int) -> Any:
        return self.stand_in((("layer", out, into),))["layer"]

    def initial(self, slot: Slot, rng: np.random.Generator, weights: Weights | None) -> Tensor:
        """Zeros; as the frame a few numbers of a drawn change, which tell where a site has another M."""
        if slot.role != "frame" or weights is None:
            return super().initial(slot, rng, weights)
        import torch

        out, into = weights(slot.module).shape
        self.layers_of[slot.module] = (out, into)
        alone, probe = self._alone(out, into), generator(0, "probe", out, into)
        made = alone.change(torch.from_numpy(probe.standard_normal(alone.shape).astype(np.float32))).double()
        made = (made / made.norm()).flatten().numpy()
        places = np.argsort(-np.abs(np.round(made, 5)), kind="stable")[:_PLACES]
        return rounded(np.round(made[places], 3))

    def changes(self, layout: Layout, adapter: Mapping[str, Tensor]) -> dict[str, Any]:
        """Of each layer its change, as a tensor of torch (out x in)."""
        import torch

        values = dict(modules_of(layout, "values"))
        made = self.stand_in(self.sizes)
        with torch.no_grad():
            return {m: made[m].change(torch.from_numpy(np.asarray(adapter[n]))) for m, n in values.items()}

    def lazy(self, layout: Layout, adapter: Mapping[str, Tensor]) -> Mapping[str, Lazy]:
        """`M(theta)` of each layer."""
        return {module: Whole(made.numpy()) for module, made in self.changes(layout, adapter).items()}

    def change(self, layout: Layout, adapter: Mapping[str, Tensor]) -> Change:
        """As wide as the layer."""
        return {module: whole.factors() for module, whole in self.lazy(layout, adapter).items()}

    def exact(self, moving: Collection[str]) -> bool:
        """As was measured."""
        return True

    def noise_gain(
        self, layout: Layout, adapter: Mapping[str, Tensor], moving: Collection[str]
    ) -> dict[str, float]:
        """`s ||M||_F`, by numbers of theta one at a time where they are few, else by seeded draws of noise."""
        moves = "values" in moving
        return {m: self.gain(out, into) if moves else 0.0 for m, (out, into) in self.layers_of.items()}

    def gain(self, out: int, into: int) -> float:
        """The same of a layer (out x in) beside which there is no other."""
        return self.scaling() * float(self._alone(out, into).length())

    def owner(self, name: str) -> str | None:
        """That of theta; empty for the frames that peft saves too."""
        above, _, last = name.rpartition(".")
        theta = LINEAR[self.config]
        if last == theta:
            return above.removeprefix(PREFIX)
        return "" if last.startswith(theta.partition("_")[0] + "_") else None

    def adopt(self, layout: Layout, drawn: Mapping[str, Tensor], saved: Saved) -> Adapter:
        """The theta of an adapter of the same configuration, which holds all scaling."""
        taken: Adapter = {}
        for module, name in modules_of(layout, "values"):
            key = f"{PREFIX}{module}.{LINEAR[self.config]}"
            if key not in saved.tensors or saved.tensors[key].shape != layout[name].shape:
                raise SettingError("model.start", f"it has no {LINEAR[self.config]} of that size for {module}")
            taken[name] = (saved.tensors[key] / self.scaling()).astype(np.float32)
        return taken

    def export(
        self, layout: Layout, adapter: Mapping[str, Tensor], merged: Change | None = None
    ) -> tuple[Adapter, int | None]:
        """An adapter of peft's own kind; with something merged an ordinary LoRA that holds both."""
        if merged:
            return super().export(layout, adapter, merged)
        from peft.utils import get_peft_model_state_dict

        whole = next(iter(self.stand_in(self.sizes).values())).whole
        tensors = {n: t.detach().numpy() for n, t in get_peft_model_state_dict(whole).items()}
        for module, name in modules_of(layout, "values"):
            theta = adapter[name] * np.float32(self.scaling())
            tensors[f"{PREFIX}{module}.{LINEAR[self.config]}"] = theta
        return tensors | {n: t for n, t in adapter.items() if layout[n].role == "head"}, None

    def saved_as(self, config: Any, rank: int | None) -> Any:
        """That of peft's kind, for the same layers."""
        if rank is not None:
            return super().saved_as(config, rank)
        made = _config(self.config, self.r, self.told)
        for name in ("task_type", "modules_to_save", "base_model_name_or_path", "inference_mode"):
            setattr(made, name, getattr(config, name))
        made.target_modules = config.target_modules
        made.exclude_modules = config.exclude_modules
        if hasattr(made, "layers_to_transform"):
            made.layers_to_transform = config.layers_to_transform
        return made


def _known(name: str) -> set[str]:
    """The options of a configuration of peft that are its own."""
    import peft

    own = {f.name for f in fields(getattr(peft, name))} - {f.name for f in fields(peft.PeftConfig)} - {*OURS}
    return {option for option in own if not option.endswith("_pattern")}  # by layer: one is enough here


def _config(name: str, r: int, told: tuple[tuple[str, Any], ...]) -> Any:
    """A configuration of peft.

    Raises:
        SettingError: it has no such option, or refuses a value.
    """
    import peft

    cls, known, key = getattr(peft, name), _known(name), "model.adapter.kind"
    for option, _ in told:
        if option not in known:
            raise SettingError(
                f"{key}.{option}", f"{name} has no option {option!r}: {suggestion(option, sorted(known))}"
            )
    given = {**({"r": r} if "r" in known else {}), **_UNSEEDED.get(name, {}), **dict(told)}
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise _refused(name, error) from error


def _refused(name: str, error: Exception) -> SettingError:
    why = next(iter(str(error).splitlines()), type(error).__name__)
    return SettingError("model.adapter.kind", f"{name}: {cut(why, _SAID)}")


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer of a stand-in.

    Attributes:
        whole: the stand-in, as a `peft.PeftModel`.
        layer: of peft.
        name: of what trains, in it.
    """

    whole: Any
    layer: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of theta."""
        return tuple(getattr(self.layer, self.name)["default"].shape)

    def change(self, theta: Any) -> Any:
        """`M(theta)`, (out x in), with a graph where theta has one; None: of a drawn theta."""
        import torch

        if theta is None:
            theta = torch.from_numpy(generator(0, "theta", *self.shape).standard_normal(self.shape)).float()
        called = torch.nn.Module()
        called.add_module("layer", self.layer)
        called.forward = self._made
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse invariant checks", UserWarning)  # of SHiRA
            return torch.func.functional_call(called, {f"layer.{self.name}.default": theta.float()}, ())

    def _made(self) -> Any:
        import torch

        base = self.layer.get_base_layer()
        if self.name == "miss_block":  # its own would add to a weight
            return self.layer(torch.eye(base.in_features, device=base.weight.device)).T
        made = self.layer.get_delta_weight("default")
        return made.to_dense() if made.is_sparse else made

    def error(self) -> float:
        """How far the change of a mean of three is from the mean of changes, relative to that."""
        import torch

        rng = generator(0, "averages", *self.shape)
        thetas = [torch.from_numpy(rng.standard_normal(self.shape)).float() for _ in range(3)]
        with torch.no_grad():
            mean = sum(self.change(theta).double() for theta in thetas) / 3
            wrong = self.change(sum(thetas) / 3).double() - mean
            zero = self.change(torch.zeros(self.shape)).double()
            return float((wrong.norm() + zero.norm() + self._by_weight(thetas[0])) / mean.norm())

    def _by_weight(self, theta: Any) -> float:
        """How far the change is another one where the weight is another one: of MiSS alone, whose layer has it."""
        import torch

        if self.name != "miss_block":
            return 0.0
        base, made = self.layer.get_base_layer(), self.change(theta)
        before = base.weight.data
        try:
            base.weight.data = torch.ones(before.shape, device=before.device)
            whole = self.change(theta) - base.weight
        finally:
            base.weight.data = before
        return float((whole - made).norm())

    def length(self) -> float:
        """`||M||_F`: exact where theta has few numbers, else of the mean of seeded draws."""
        import torch

        size = math.prod(self.shape)
        few = size <= _PROBES
        rng = generator(0, "length", *self.shape)
        with torch.no_grad():
            squares = 0.0
            for i in range(size if few else _PROBES):
                theta = np.eye(1, size, i) if few else rng.standard_normal(size)
                made = self.change(torch.from_numpy(theta.reshape(self.shape)).float())
                squares += float(made.double().square().sum()) / (1 if few else _PROBES)
        return math.sqrt(squares)


@lru_cache(maxsize=8)
def _stand_in(
    name: str, r: int, told: tuple[tuple[str, Any], ...], sizes: Sizes, device: Any
) -> Mapping[str, _Layer]:
    """The layers of a model of linear layers of some sizes, without their weights, and with peft's kind in them.

    Raises:
        SettingError: peft refuses the configuration, or these layers.
    """
    import torch
    from peft import get_peft_model

    root = torch.nn.Module()
    for path, out, into in sizes:
        *above, last = path.split(".")
        at = root
        for part in above:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        linear = torch.nn.Linear(1, 1, bias=False)
        linear.out_features, linear.in_features = out, into
        linear.weight = torch.nn.Parameter(torch.zeros(1).expand(out, into), requires_grad=False)
        at.add_module(last, linear)
    config = _config(name, r, told)
    config.target_modules = [path for path, _, _ in sizes]
    try:
        whole = get_peft_model(root, config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refused(name, error) from error
    whole.requires_grad_(False)
    whole.eval().to(device)
    found = dict(whole.named_modules())
    for path, out, into in sizes:  # which moving them made whole
        base = found[f"base_model.model.{path}"].get_base_layer()
        base.weight.data = torch.zeros(1, device=device).expand(out, into)
    made = {path: _Layer(whole, found[f"base_model.model.{path}"], LINEAR[name]) for path, _, _ in sizes}
    try:
        next(iter(made.values())).change(None)
    except (TypeError, ValueError, RuntimeError) as error:  # some values are looked at by then alone
        raise _refused(name, error) from error
    return made
