"""What runs in a Ray actor: a worker, on the base with all merges so far in it."""

import importlib
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.adapter import Adapter, Change
from fedlora.engine import hardware, trial
from fedlora.engine.setup import Setup
from fedlora.engine.worker import Worker
from fedlora.errors import UserError


class Resident:
    """The actor.

    It imports while the run is still being prepared. Its worker is built by a call, so that what goes
    wrong then is reported as it was raised.
    """

    def __init__(self) -> None:
        for module in ("torch", "transformers.models.auto", "peft"):
            importlib.import_module(module)
        self.worker: Worker | None = None

    def call(self, setup: Sequence[Any], merges: Sequence[Any], method: str, *arguments: Any) -> Any:
        """The result of a worker's method, on the base with all merges so far in it.

        Args:
            setup: a reference to it, inside a sequence so that it is fetched once and not for each call.
            merges: references to them.
            method: of `Worker`, or of this class.
            arguments: of the method.

        Raises:
            UserError: a folder that all nodes share is not here.
        """
        import ray

        if self.worker is None:
            told: Setup = ray.get(setup[0])
            check_shared(told.dataset, told.partitions)
            self.worker = Worker(told)
        if method == "train" and (personal := self.worker.setup.personal) is not None:
            check_shared(personal.parent)
        for reference in merges[self.worker.merged :]:
            self.worker.merge(ray.get(reference))
        return getattr(self if method in ("exported", "measured") else self.worker, method)(*arguments)

    def measured(self) -> hardware.Measured:
        """What the worker takes of its GPU."""
        assert self.worker is not None
        return trial.measure(self.worker)

    def exported(self, adapter: Adapter, merged: Change | None) -> dict[str, bytes]:
        """The files that an export writes, by name: the run's folder may be on another machine."""
        assert self.worker is not None
        with tempfile.TemporaryDirectory() as name:
            self.worker.export(adapter, folder := Path(name) / "adapter", merged)
            return {file.name: file.read_bytes() for file in folder.iterdir()}


def check_shared(*folders: Path) -> None:
    """Make sure that folders are here which all nodes of a cluster share.

    Raises:
        UserError: one is not.
    """
    for folder in folders:
        if not folder.exists():
            raise UserError(
                f"{folder}: is not on {platform.node()}, a node of the cluster: let FEDLORA_CACHE and --out name "
                "folders that all nodes share"
            )
