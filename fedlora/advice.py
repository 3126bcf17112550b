"""How much of what clients send under privacy is signal, and what raises its share, by arithmetic alone.

The model, for the mean over K clients of a step of batch B, with d numbers trained and noise multiplier sigma:

    bound of the signal    C, as long as a mean of clipped gradients can be (L2)
    noise in a number      sigma C / (B sqrt(K))
    length of the noise    n = sigma C sqrt(d) / (B sqrt(K))
    signal over noise      C / n in a step; over T steps signals add up and noise averages out:
                           T C / (sqrt(T) n) = sqrt(T K) B / (sigma sqrt(d))

Where privacy protects clients a step is a round, C bounds a client's change, K is how many a round draws on
average, and the sum is noised once: a number's noise is sigma C / K.

What it leaves out: how much of C a gradient's mean really has, which falls with the batch where examples disagree;
how much less a model with fewer layers or a lower rank can learn; how far fewer, larger steps get; how clients
drift apart in local steps. So it ranks what is alike in these. All numbers that a client trains count, those of
tensors that take turns within a round too, and sigma is that of the client with the median number of examples. No
private row is looked at.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedlora.privacy import accounting
from fedlora.privacy.accounting import Event
from fedlora.privacy.mechanisms.bands import choose, coefficients, in_weights
from fedlora.rehearsal import Rehearsal
from fedlora.rounds.progress import Line
from fedlora.scenario import Privacy, Scenario

TIMES = (2, 4, 8, 16)  # the batch, that are tried
_SHOWN = 8  # alternatives that are told
_OFF = 0.05  # share by which an alternative's examples may differ
_LEAST = 4  # rounds of an alternative
_WHOLE = 20  # rounds of steps that take all examples: noise over the run does not grow with their number
_ALIKE = 0.005  # share by which ratios have to differ to tell alternatives apart

Rehearse = Callable[[Scenario], Rehearsal]  # the first rounds of a scenario
Seconds = Callable[
    [Scenario, float], float | None
]  # of a scenario's rounds, where it passes a share of the layers


@dataclass(frozen=True, kw_only=True)
class Signal:
    """Signal and noise in the mean of a step; under `unit: client` of a round.

    Attributes:
        numbers: d, that a client trains.
        batch_size: B, expected; None where clients are protected.
        clients: K, in a round.
        steps: T, of the whole run.
        noise_multiplier: sigma.
        bound: C, in L2 norm.
        bands: of the noise; 1: each step's is independent.
        share: of the rounds that a client takes part in.
        parts: that clients divide the noise's variance into, where they share it out.
        reserve: steps beyond T that epsilon has room for, and bands are fitted to.
    """

    numbers: int
    batch_size: int | None
    clients: int
    steps: int
    noise_multiplier: float
    bound: float
    bands: int = 1
    share: float = 1.0
    parts: float = 1.0
    reserve: int = 0

    @property
    def noise(self) -> float:
        """Standard deviation of the noise in a number."""
        over = self.clients if self.batch_size is None else self.batch_size * math.sqrt(self.clients * self.parts)
        return self.noise_multiplier * self.bound / over

    @property
    def noise_length(self) -> float:
        """Expected L2 norm of the noise, about."""
        return self.noise * math.sqrt(self.numbers)

    @property
    def ratio(self) -> float:
        """The bound of the signal over the length of the noise, in a step."""
        return self.bound / self.noise_length

    @property
    def run_ratio(self) -> float:
        """The same over all steps together; banded noise cancels over the steps of one client."""
        if self.bands == 1:
            return math.sqrt(self.steps) * self.ratio
        c = coefficients(self.bands, self.steps + self.reserve)
        own = float(in_weights(c, max(round(self.steps * self.share), 1))[-1])
        return self.steps * self.ratio / (own / math.sqrt(self.share))

    def to_json(self) -> Line:
        """Plain data."""
        names = ("noise", "noise_length", "ratio", "run_ratio")
        return asdict(self) | {name: getattr(self, name) for name in names}


def signal(
    scenario: Scenario, loop: Rehearsal, noise_multiplier: float, typical: int, bands: int = 1
) -> Signal | None:
    """Of a scenario, by its rehearsal; None without privacy."""
    asked, told = scenario.privacy, scenario.clients
    if asked is None:
        return None
    whole = asked.unit == "client"
    return Signal(
        numbers=_numbers(loop),
        batch_size=None if whole else told.batch(typical),
        clients=told.cohort_size,
        steps=scenario.rounds if whole else scenario.rounds * told.local_steps,
        noise_multiplier=noise_multiplier,
        bound=asked.clip_norm,
        bands=bands,
        share=1.0 if whole else told.cohort_size / told.total,
        parts=scenario.noise_parts(scenario.most_members),
        reserve=0 if whole else asked.reserve * told.local_steps,
    )


def _numbers(loop: Rehearsal) -> int:
    """The most numbers that a client trains in a round."""
    layout, rounds = loop.strategy.layout, range(1, min(len(loop.lines), 2) + 1)
    names = [[n for n in loop.strategy.trains(r, layout) if layout[n].trainable] for r in rounds]
    return max(sum(int(np.prod(layout[n].shape)) for n in each) for each in names)


def advise(
    scenario: Scenario,
    now: Signal,
    loop: Rehearsal,
    sizes: Mapping[int, int],
    typical: int,
    rehearse: Rehearse,
    seconds: Seconds,
) -> list[Line]:
    """Alternatives at the same epsilon, the best ratio first, the scenario among them.

    They pass as many examples as the scenario does; beside them are some whose steps take all examples of a
    client, which may pass more.

    Args:
        scenario: of the run.
        now: its signal and noise.
        loop: its rehearsal.
        sizes: how many clients hold so many examples.
        typical: examples of the median client.
        rehearse: the first rounds of an alternative.
        seconds: that an alternative takes.

    Returns:
        For each `batch_size, local_steps, rounds, layers, r, numbers, noise_multiplier, bands, ratio, run_ratio,
        bytes_up_total, bytes_down_total, seconds`, and in `set` what to type; empty for the scenario itself.
    """
    event = Event(
        noise_multiplier=now.noise_multiplier,
        sample_rate=min(_rate(scenario, typical) * now.bands, 1.0),
        steps=now.steps,
        clip_norm=now.bound,
        bands=now.bands,
    )
    asked = scenario.privacy
    assert asked is not None  # else there is no noise
    target = min(accounting.epsilon([event], asked.delta, asked.accountant), asked.epsilon or math.inf)
    if asked.noise_multiplier is None and asked.epsilon is not None:
        target = asked.epsilon
    found: list[Line] = []
    for shape in _shapes(scenario, loop):
        shaped = _with(scenario, shape)
        first = loop if not shape else rehearse(shaped)
        sent = {way: [line[way] for line in first.lines[:2]] for way in ("bytes_up", "bytes_down")}
        for schedule in _schedules(scenario, min(size for size in sizes if size)):
            made = _with(shaped, schedule)
            same = not (shape or schedule)
            local = 1 if now.batch_size is None else made.clients.local_steps
            spare = asked.reserve if now.batch_size is None else 0
            steps = (made.rounds + asked.reserve - spare) * local
            sigma, b = now.noise_multiplier, now.bands
            if schedule:
                rate = _rate(made, typical)
                b = _bands(asked, target, rate, steps, spare)
                rate, turns = min(b * rate, 1.0), -(-steps // b) + spare
                sigma = accounting.calibrate(target, asked.delta, rate, turns, asked.accountant)
            figures = signal(made, first, sigma, typical, b)
            assert figures is not None
            typed = {**shape, **schedule, **_noise_keys(asked, sigma if schedule else None)}
            found.append(
                {
                    "batch_size": made.clients.batch(typical),
                    "local_steps": made.clients.local_steps,
                    "rounds": made.rounds,
                    "layers": _layers(first),
                    "r": made.model.adapter.r,
                    "numbers": figures.numbers,
                    "noise_multiplier": sigma,
                    "bands": b,
                    "ratio": figures.ratio,
                    "run_ratio": figures.run_ratio,
                    **{f"{way}_total": round(made.rounds * sum(each) / len(each)) for way, each in sent.items()},
                    "seconds": seconds(made, _passed(first) / _passed(loop)),
                    "set": "" if same else " ".join(f"--set {key}={_word(value)}" for key, value in typed.items()),
                }
            )
    found.sort(key=lambda line: (-round(math.log(line["run_ratio"]) / _ALIKE), line["bytes_up_total"]))
    best = found[:_SHOWN]
    return best if any(not line["set"] for line in best) else [*best, next(f for f in found if not f["set"])]


def _rate(scenario: Scenario, typical: int) -> float:
    """With which a step takes an example, or a round a client."""
    told = scenario.clients
    if scenario.client_privacy is not None:
        return told.cohort_size / told.total
    return min(told.rate(typical), 1.0)


def _bands(asked: Privacy, target: float, rate: float, steps: int, spare: int) -> int:
    """Of the noise of an alternative."""
    if asked.bands != "auto":
        return asked.bands or 1

    def noise(rate: float, turns: int) -> float:
        return accounting.calibrate(target, asked.delta, rate, turns, asked.accountant)

    return choose(target, asked.delta, rate, steps, noise, spare)


def _shapes(scenario: Scenario, loop: Rehearsal) -> Iterator[Mapping[str, Any]]:
    """Adapters to try, by what they change: upper layers alone, half the rank at the same scale."""
    told, layers = scenario.model.adapter, _layers(loop)
    fixed = scenario.model.start is not None
    uppers = [layers[-count:] for count in (-(-len(layers) // 2), -(-len(layers) // 3))] if not fixed else []
    ranks = [told.r // 2] if told.r > 1 and not fixed and not scenario.clients.unequal_ranks(told.r) else []
    for upper in (None, *dict.fromkeys(tuple(u) for u in uppers if u and len(u) < len(layers))):
        for rank in (None, *ranks):
            shape: dict[str, Any] = {} if upper is None else {"model.adapter.layers": list(upper)}
            if rank is not None:
                same = (rank / told.r) ** (0.5 if told.rslora else 1)
                shape |= {"model.adapter.r": rank, "model.adapter.alpha": told.alpha * same}
            yield shape


def _schedules(scenario: Scenario, smallest: int) -> Iterator[Mapping[str, Any]]:
    """Batches, local steps and rounds to try, by what they change; its own first, then all examples in a step."""
    told, rounds = scenario.clients, scenario.rounds
    key = "batch_size" if told.sample_rate is None else "sample_rate"
    batch = getattr(told, key)
    asked = scenario.example_privacy
    groups = asked.bands if asked is not None and isinstance(asked.bands, int) else 1
    yield {}
    if asked is not None and groups == 1 and (told.sample_rate or 0.0) < 1 and rounds >= _LEAST:
        fewer = min(_WHOLE, rounds)
        changed = {"clients.sample_rate": 1.0, "clients.local_steps": 1, "rounds": fewer}
        before = (told.sample_rate, told.local_steps, rounds)
        yield {name: v for (name, v), old in zip(changed.items(), before, strict=True) if v != old}
    for times in TIMES:
        if scenario.client_privacy is not None:  # what a round costs does not depend on its steps
            options = [(1, times * told.local_steps)]
        else:
            options = [(times, s) for s in dict.fromkeys((told.local_steps, max(told.local_steps // 2, 1), 1))]
        for larger, steps in options:
            work = larger * steps / told.local_steps  # of a round, over what it is now
            fewer = round(rounds / work)
            most = larger * groups * max(told.batch(smallest) / smallest, told.sample_rate or 0.0)  # a rate
            if most > 1 or groups > fewer * steps or fewer < min(_LEAST, rounds):
                continue
            if abs(fewer * work / rounds - 1) <= _OFF:
                changed = {f"clients.{key}": larger * batch, "clients.local_steps": steps, "rounds": fewer}
                before = (batch, told.local_steps, rounds)
                yield {name: v for (name, v), old in zip(changed.items(), before, strict=True) if v != old}
                break  # fewer local steps mean more rounds, and the same noise


def _with(scenario: Scenario, changed: Mapping[str, Any]) -> Scenario:
    """A scenario with some settings of these changed."""
    told = {key.rpartition(".")[2]: value for key, value in changed.items()}
    clients: dict[str, Any] = {
        key: told[key] for key in ("batch_size", "sample_rate", "local_steps") if key in told
    }
    shape: dict[str, Any] = {key: told[key] for key in ("layers", "r", "alpha") if key in told}
    if "layers" in shape:
        shape["layers"] = tuple(shape["layers"])
    adapter = scenario.model.adapter.model_copy(update=shape)
    return scenario.model_copy(
        update={
            "clients": scenario.clients.model_copy(update=clients),
            "model": scenario.model.model_copy(update={"adapter": adapter}),
            "rounds": told.get("rounds", scenario.rounds),
        }
    )


def _noise_keys(asked: Privacy, sigma: float | None) -> dict[str, Any]:
    """What to set where the noise is given and not calibrated."""
    return {} if asked.noise_multiplier is None or sigma is None else {"privacy.noise_multiplier": sigma}


def _layers(loop: Rehearsal) -> list[int]:
    """The numbers of the layers that have factors, ascending; none where layers have no numbers."""
    names = [name for name, slot in loop.strategy.layout.items() if slot.role != "head"]
    return sorted({int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", f".{name}"))})


def _passed(loop: Rehearsal) -> int:
    """Layers from the lowest with factors on: those that are passed once what is below is kept on disk."""
    layers = _layers(loop)
    return layers[-1] - layers[0] + 1 if layers else 1


def _word(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
