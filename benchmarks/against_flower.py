"""fedlora and Flower's own simulation at the same work, as a good Flower user would write it.

    python benchmarks/against_flower.py [--pairs 8] [--lr 0.5] [--accuracy 0 1 2 --rounds 30]

`flower` loads the model for each client, as Flower's examples do; `flower cached` keeps one in each of its actors.
The workload and the way of timing are in `contest.py`.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import contest

CONTENDERS = ("fedlora auto", "fedlora fp32", "flower", "flower cached")
_kept: dict[str, Any] = {}  # in an actor of Flower's: its data, and with `cached` its model


def app(cached: bool, seed: int, lr: float) -> Any:
    """The client."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    made = ClientApp()

    @made.train()
    def fit(message: Message, context: Context) -> Message:
        import against_flower  # the module by its name: what is kept in __main__ is gone with the next client
        import torch

        torch.set_num_threads(1)
        kept = against_flower._kept
        if "data" not in kept:
            kept["data"] = contest.data(seed)
        data = kept["data"]
        model = kept.get("model") or contest.net(len(data.labels), seed)
        if cached:
            kept["model"] = model
        model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=False)
        rows = data.partition(int(context.node_config["partition-id"])).rows
        tokens = contest.train(model, data.train, rows, lr)
        figures = MetricRecord({"num-examples": len(rows), "tokens": tokens})
        return Message(RecordDict({"arrays": ArrayRecord(trained(model)), "metrics": figures}), reply_to=message)

    return made


def trained(model: Any) -> Mapping[str, Any]:
    """The tensors that train."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def run(cached: bool, rounds: int, seed: int, lr: float) -> None:
    """Be the contender."""
    import logging
    import os

    os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    data = contest.data(seed)
    model = contest.net(len(data.labels), seed)

    class Turns(FedAvg):
        def aggregate_train(
            self, server_round: int, replies: Iterable[Message]
        ) -> tuple[ArrayRecord | None, MetricRecord | None]:
            replies = list(replies)
            found = super().aggregate_train(server_round, replies)
            good = [reply for reply in replies if reply.has_content()]
            assert len(good) == contest.COHORT and found[0] is not None
            score = 0.0
            if server_round == rounds:
                model.load_state_dict(found[0].to_torch_state_dict(), strict=False)
                score = contest.accuracy(model, data.test)
            contest.turn(sum(float(r.content["metrics"]["tokens"]) for r in good), accuracy=score)
            return found

    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        share = contest.COHORT / contest.CLIENTS
        strategy = Turns(fraction_train=share, fraction_evaluate=0.0, min_available_nodes=contest.CLIENTS)
        strategy.start(grid, ArrayRecord(trained(model)), num_rounds=rounds, train_config=ConfigRecord())

    resources = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 2}}
    run_simulation(server, app(cached, seed, lr), contest.CLIENTS, backend_config=resources)


def main(arguments: Sequence[str]) -> None:
    """Compare, or be a contender."""
    told = contest.arguments(*CONTENDERS).parse_args(arguments)
    if told.run is None:
        contest.main(__file__, told, {name: [sys.executable, __file__] for name in CONTENDERS[2:]})
    elif told.run.startswith("fedlora"):
        contest.fedlora(told.rounds, told.seed, told.lr, told.run.split()[1])
    else:
        run(told.run == "flower cached", told.rounds, told.seed, told.lr)


if __name__ == "__main__":
    main(sys.argv[1:])
