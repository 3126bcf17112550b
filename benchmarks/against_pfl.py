"""fedlora and pfl (https://github.com/apple/pfl-research) at the same work.

    python benchmarks/against_pfl.py --venv DIR [--pairs 8] [--lr 0.5] [--accuracy 0 1 2 --rounds 30]

pfl asks for older packages, so it lives in a virtual environment of its own. It is made in DIR if it is not there:
pfl and what only it needs from the package index, the rest borrowed from this environment. It runs in one process
with torch's threads on all cores. The workload and the way of timing are in `contest.py`.
"""

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contest

CONTENDERS = ("fedlora auto", "fedlora fp32", "pfl")
PACKAGES = ("pfl==0.6.0", "multiprocess>=0.70.15,<0.71", "prv-accountant>=0.2,<0.3", "dp-accounting>=0.4,<0.6")


def environment(folder: Path) -> str:
    """The interpreter of pfl's virtual environment."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES], check=True)
        ours = [path for path in sys.path if path.endswith("site-packages")]
        root = str(Path(__file__).parents[1])
        next(folder.glob("lib/*/site-packages")).joinpath("borrowed.pth").write_text("\n".join([*ours, root]))
    return str(python)


def run(rounds: int, seed: int, lr: float) -> None:
    """Be the contender."""
    import numpy as np
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    np.random.seed(seed)
    data = contest.data(seed)
    seen: list[int] = []

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = contest.net(len(data.labels), seed)

        def loss(self, ids: Any, mask: Any, labels: Any, eval: bool = False) -> Any:
            self.train(not eval)
            longest = int(mask.sum(1).max())
            return self.inner(input_ids=ids[:, :longest], attention_mask=mask[:, :longest], labels=labels).loss

        def metrics(self, ids: Any, mask: Any, labels: Any, eval: bool = False) -> Any:
            with torch.no_grad():
                return {"loss": Weighted(float(self.loss(ids, mask, labels, eval)) * len(ids), len(ids))}

    def user(client: int) -> Any:
        rows = data.partition(client).rows
        seen.append(int(data.train.lengths(rows).sum()))
        batch = contest.padded(data.train, np.random.permutation(rows))
        held = [batch["input_ids"], batch["attention_mask"], batch["labels"]]
        return Dataset(raw_data=held, eval_kwargs={"eval": True})

    class Turns(TrainingProcessCallback[Any]):
        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> tuple[bool, Any]:
            last = central_iteration == rounds - 1
            score = contest.accuracy(model.pytorch_model.inner, data.test) if last else 0.0
            contest.turn(sum(seen), accuracy=score)
            seen.clear()
            return False, Metrics()

    net = Net()
    weights = [p for p in net.parameters() if p.requires_grad]
    model = PyTorchModel(
        net,
        local_optimizer_create=lambda all, lr: torch.optim.SGD([p for p in all if p.requires_grad], lr=lr),
        central_optimizer=torch.optim.SGD(weights, lr=1.0),
    )
    users = FederatedDataset(user, get_user_sampler("minimize_reuse", list(range(contest.CLIENTS))))
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=10**9,
            train_cohort_size=contest.COHORT,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=users, val_data=users),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=lr, local_batch_size=contest.BATCH),
        NNEvalHyperParams(local_batch_size=None),
        [Turns()],
    )


def main(arguments: Sequence[str]) -> None:
    """Compare, or be a contender."""
    parser = contest.arguments(*CONTENDERS)
    parser.add_argument("--venv", type=Path, help="where pfl is, or will be made")
    told = parser.parse_args(arguments)
    if told.run is None:
        if told.venv is None:
            parser.error("--venv says where pfl's virtual environment is or will be")
        contest.main(__file__, told, {"pfl": [environment(told.venv), __file__]})
    elif told.run.startswith("fedlora"):
        contest.fedlora(told.rounds, told.seed, told.lr, told.run.split()[1])
    else:
        run(told.rounds, told.seed, told.lr)


if __name__ == "__main__":
    main(sys.argv[1:])
