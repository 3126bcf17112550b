"""A private client that fails where it is told to, for the engine's tests."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from fedlora.adapter import Update
from fedlora.clients.dp_sgd import DPSGD
from fedlora.clients.sgd import SGD


class Faulty(DPSGD):
    """`fail` names the client, `fault` what it does."""

    def fit(self, task, adapter, partition, settings, rng):
        update = super().fit(task, adapter, partition, settings, rng)
        if settings.config.get("fail") != partition.client:
            return update
        name = next(iter(update.adapter))
        match settings.config.get("fault", "raise"):
            case "raise":
                raise RuntimeError("as told")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "nan":
                update.adapter[name][:] = np.nan
            case "shape":
                update.adapter[name] = update.adapter[name][:1]
            case "keys":
                del update.adapter[name]
            case "weight":
                object.__setattr__(update, "weight", -1.0)
            case "claim":
                object.__setattr__(update, "weight", 1e9)
            case "other":
                object.__setattr__(update, "clients", (0,))
            case "hang":
                time.sleep(600)
            case "memory":
                np.ones(2**55)  # more than can be addressed
            case "greed" if not (done := Path(str(settings.config["done"]))).exists():
                done.touch()  # once is enough
                (Path(str(settings.config["group"])) / "cgroup.procs").write_text(str(os.getpid()))
                np.ones(2**25)  # 256 MiB, of 64
        return update


class Broken(DPSGD):
    """Fails at every client."""

    def fit(self, task, adapter, partition, settings, rng):
        raise RuntimeError("gone")


class Flaky(DPSGD):
    """Fails at the clients that `lose` lists."""

    def fit(self, task, adapter, partition, settings, rng):
        if str(partition.client) in str(settings.config.get("lose", "")).split(","):
            raise RuntimeError("gone")
        return super().fit(task, adapter, partition, settings, rng)


class Leaky(SGD):
    """Keeps its optimiser, whose momentum one client hands on to the next."""

    optimizer = None

    def fit(self, task, adapter, partition, settings, rng):
        import torch

        parameters = task.begin(adapter, settings.train)
        self.optimizer = self.optimizer or torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        task.losses(task.batch(partition.examples, partition.rows[:2])).sum().backward()
        self.optimizer.step()
        return Update(adapter=task.read(settings.send), weight=1.0, clients=(partition.client,))


class Slow(DPSGD):
    """Writes the file that `mark` names, and takes two seconds, where the strategy names one."""

    def fit(self, task, adapter, partition, settings, rng):
        if mark := settings.config.get("mark"):
            Path(str(mark)).touch()
            time.sleep(2)
        return super().fit(task, adapter, partition, settings, rng)
