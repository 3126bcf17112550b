"""Plain local SGD (McMahan et al., 2017, https://arxiv.org/abs/1602.05629): no clipping, no noise, no privacy."""

from typing import TYPE_CHECKING

import numpy as np

from fedlora.adapter import Adapter, Update
from fedlora.client import Pass, Passes, Rng, Settings, Stepwise, moved, pull_towards, pulled, resting
from fedlora.data.store import Partition
from fedlora.optimizers.contract import Steps, grouped
from fedlora.optimizers.low_pass import smooth

if TYPE_CHECKING:
    from fedlora.tasks.contract import Task


class SGD(Stepwise):
    """`local_steps` of SGD over shuffled passes; weighs by its number of examples."""

    hooked = True

    def passes(
        self, task: "Task", adapter: Adapter, partition: Partition, settings: Settings, rng: Rng
    ) -> Passes[Update]:
        """Train; `train_loss` is the mean loss of an example over all steps."""
        import torch

        parameters = task.begin(adapter, settings.train)
        received = [p.detach().clone() for p in parameters]
        optimizer = self.optimizer(grouped(task.layout, settings.train, parameters, settings), settings)
        steps = Steps(optimizer, settings.train, parameters, settings)
        batches, size = rng("batches"), min(settings.batch_size, len(partition))
        waiting = np.empty(0, np.int64)
        loss_sum = torch.zeros((), device=task.device)
        for step in range(settings.local_steps):
            if len(waiting) < size:
                waiting = np.concatenate([waiting, batches.permutation(partition.rows)])
            rows, waiting = waiting[:size], waiting[size:]
            optimizer.zero_grad()
            still = resting(task, settings, step)
            for name, parameter in zip(settings.train, parameters, strict=True):
                parameter.requires_grad_(name not in still)
            for batch, _ in task.micro_batches(partition.examples, rows, settings.micro_batch_size):
                loss_sum += yield Pass(batch, over=size)
            pull_towards(parameters, received, settings.config)
            smooth(task, dict(zip(settings.train, parameters, strict=True)), settings.config)
            asked = step == 0 and pulled(parameters)
            steps.take(step)
            if asked:
                moved(parameters, received, each=False)
        return Update(
            adapter=task.read(settings.send),
            weight=float(len(partition)),
            clients=(partition.client,),
            metrics={"train_loss": float(loss_sum) / settings.local_steps},
            state=steps.kept(),
        )
