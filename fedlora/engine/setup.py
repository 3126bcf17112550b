"""What a worker gets before it starts, and what it reports once it has built its model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedlora.adapter import Adapter, Layout
from fedlora.kinds.contract import Kind
from fedlora.passes.kept import Wanted

Half = Literal["test", "validation"]
"""Rows of the server's own: those that report, or those that choose the best round."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a worker needs to know, as plain data that can be sent to it.

    Attributes:
        scenario: resolved, as `Scenario.model_dump` gives it.
        dataset: folder of the tokenised examples.
        partitions: folder of the partition.
        threads: of torch.
        precision: `fp32`, `bf16`, or `auto`: as the worker finds its device.
        device: a torch device, or `auto`: a GPU where there is one.
        noise: the calibrated noise multiplier for each number of examples; None without privacy.
        bands: of the noise, likewise; None where it is independent.
        personal: folder of what stays with each client; None where nothing does.
        kept: folder of what the layers below all factors make of examples; None: in memory, where it fits.
        base: folder of the base that the run made of `model.base`; None: that itself.
        secret: whether noise is drawn from the operating system and not from the scenario's seed.
    """

    scenario: Mapping[str, Any]
    dataset: Path
    partitions: Path
    threads: int = 1
    precision: str = "fp32"
    device: str = "cpu"
    noise: Mapping[int, float] | None = None
    bands: Mapping[int, int] | None = None
    personal: Path | None = None
    kept: Path | None = None
    base: Path | None = None
    secret: bool = False


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a worker found when it built its model."""

    layout: Layout
    initial: Adapter
    metric: str
    higher_is_better: bool
    test_examples: int
    validation_examples: int
    kind: Kind
    weights: Mapping[str, tuple[int, ...]]  # the shape of each layer with factors, (out, in)
    fingerprint: str  # of the first adapter, bit for bit: workers that differ must not serve one run
    device: str  # that it is on: `cpu` or `cuda`
    precision: str  # of training
    wanted: Wanted | None = None  # on disk before clients train
