"""What a privacy reviewer would ask of a plan."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from fedlora.advice import Signal
from fedlora.errors import counted
from fedlora.rounds.progress import Line
from fedlora.scenario import Scenario

FEW_EXAMPLES = 100  # of a client: below it a step takes so large a part of them that noise is large
RARE = 10  # examples of a label in one step, from which on noise need not hide it
WEAK = 10.0  # epsilon from which reviewers ask what it still protects


def warnings(
    scenario: Scenario,
    groups: Sequence[Line],
    parameters: Mapping[str, int],
    labels: int,
    signal: Signal | None,
) -> Iterable[str]:
    """A sentence for each.

    Args:
        scenario: of the run.
        groups: its clients by how much they hold.
        parameters: numbers that clients train, of `adapter` and of `head`.
        labels: how many there are; 0 where the task has none.
        signal: and noise, of a step; None without privacy.
    """
    asked = scenario.example_privacy
    sizes = [next(g[key] for key in ("num_examples", "num_persons") if key in g) for g in groups]
    if parameters["head"] > parameters["adapter"]:
        yield (
            f"The head trains {parameters['head']:,} numbers, more than the adapter's {parameters['adapter']:,}: "
            "most of the bytes and of the noise are the head's. See model.head, as {rank: 16}."
        )
    if (whole := scenario.client_privacy) is not None and whole.delta * scenario.clients.total >= 1:
        yield (
            f"delta {whole.delta:g} is not below one over the {scenario.clients.total} clients: such a delta lets "
            "a whole client leak. Lower privacy.delta."
        )
    if whole is not None and scenario.secure_aggregation is not None:
        yield "Clients learn how many clients are in their round: sampling does not hide anyone from them there."
    if asked is None:
        if whole is None:
            yield "There is no privacy section: updates can reveal what clients hold."
        elif scenario.shares_noise:
            yield "From the server, which knows who is in a sum, clients have the epsilon of server_epsilon alone."
        elif scenario.secure_aggregation is not None:
            yield "The server sees each round's sum without noise: the guarantee is from all others."
        else:
            yield "The server sees each client's update without noise: the guarantee is from all others."
        return
    what = asked.protects
    loose = sum(g["clients"] for g, size in zip(groups, sizes, strict=True) if asked.delta * size >= 1)
    if loose:
        largest = max(sizes)
        yield (
            f"delta {asked.delta:g} is not below 1/n for {counted(loose, 'client')}: such a delta lets a whole "
            f"{what} leak. Set privacy.delta below {0.9 / largest:.0e}."
        )
    few = sum(g["clients"] for g, size in zip(groups, sizes, strict=True) if size < FEW_EXAMPLES)
    if few:
        drowned = signal is not None and signal.batch_size is not None and signal.run_ratio < 1
        yield (
            f"{counted(few, 'client')} {'holds' if few == 1 else 'hold'} fewer than {FEW_EXAMPLES} {what}s, "
            f"the smallest {sizes[0]}: a step takes a large part of so few, which costs epsilon, or noise"
            f"{'; over all steps noise outweighs the signal' if drowned else ''}."
        )
    rate = statistics.median(g["sample_rate"] for g in groups for _ in range(g["clients"]))
    each = rate * statistics.median(
        size for g, size in zip(groups, sizes, strict=True) for _ in range(g["clients"])
    )
    if labels > 1 and each < RARE * labels and rate < 1:
        yield (
            f"A step of the median client takes {each / labels:.2g} {what}s for each of {labels} labels: noise "
            "hides what is so rare. Raise clients.sample_rate, up to 1.0 (see --advise), then run fedlora tune."
        )
    if (worst := max(g["epsilon"] for g in groups)) > WEAK:
        yield f"Epsilon {worst:.3g} allows odds to change by a factor of e^{worst:.3g}: little is promised."
    if asked.share_metrics:
        yield "privacy.share_metrics lets training losses and example counts out, which epsilon does not cover."
    if scenario.data.client_test_share is not None:
        times = counted(-(-scenario.rounds // scenario.eval_every), "evaluation")
        yield (
            f"data.client_test_share lets figures of clients' own rows out, in {times}. Epsilon does not cover "
            "them: a site refuses, or adds noise and pays for each from its own budget (figures in its file)."
        )
