"""A site's part in making the base smaller: the statistic of its rows, and the base that its server cut.

A site takes the statistic of its own rows alone, noises it from the operating system's entropy, and pays its own
ledgers before a row is passed; under masks its server sees the sum over sites alone. What comes back are two
factors for each layer that was cut. The site makes the smaller base of them and of its own copy of the whole one,
and only if they are that copy on fewer directions: `U` has orthonormal columns, and the other factor is `U^T W` of
the site's own W. So whoever sends them chooses directions and nothing else, and `accept.bases` still says which
weights see the rows.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from fedlora import compressing, prepare, wire, wire_base
from fedlora.adapter import Change, Instruction
from fedlora.compressors import contract
from fedlora.compressors.contract import Cut
from fedlora.deploy.masks import Masks
from fedlora.deploy.serving import Serving, Words
from fedlora.engine.replies import Sums
from fedlora.engine.roster import STRANGER
from fedlora.engine.statistic import Taker, mechanism
from fedlora.engine.summed import UNITS, Span
from fedlora.errors import ContractError, Refusal, SettingError
from fedlora.privacy import secure
from fedlora.privacy.accounting import Event
from fedlora.privacy.grid import Vector
from fedlora.privacy.noise import Stream
from fedlora.scenario import Scenario
from fedlora.tasks import located, smaller

BASE = "base"  # of a run's folder
_EXACT, _ROUNDED = 1e-3, 3e-2  # how far factors may be from a cut of weights in 32 bits, and in fewer

Array = NDArray[np.float32]

logger = logging.getLogger(__name__)


def answer(run: Serving, client: int, content: RecordDict, masks: Masks) -> RecordDict:
    """The noised statistic of the site's own rows; asked again, it is the same, for nothing.

    Args:
        run: whose worker has the whole base; it trains nobody afterwards.
        client: which one the site is.
        content: of the message.
        masks: with which the statistic is sent, where the scenario says so.

    Raises:
        Refusal: the run takes none that noise hides, the budget is not enough, the statistic cannot be taken, or
            the site holds no masks.
    """
    scenario = run.worker.scenario
    if (event := prepare.statistic(scenario)) is None:
        raise Refusal("the run has no statistic that noise hides")
    if run.worker.setup.base is not None:
        raise Refusal("the base of the run is cut already")
    if scenario.secure_aggregation is not None:
        return _masked(run, client, content, masks)
    question = _question(run, client, event)
    if (before := run.answers.find(0, question)) is not None:
        return _again(run, client, wire.from_bytes(before))
    return _taken(run, client, event, _taker(run), None, question)[1]


def _masked(run: Serving, client: int, content: RecordDict, masks: Masks) -> RecordDict:
    """The same under masks; noise that is shared out enters one sum, and is drawn and paid for anew in another.

    Raises:
        Refusal: as `answer`.
    """
    scenario, taker = run.worker.scenario, _taker(run)
    masks.member(run.key, 0)
    try:
        units = wire.whole(wire.unpack_words(content).get(UNITS), UNITS, 1, wire.MOST)
    except ContractError as error:
        raise Refusal(str(error)) from error
    paid: list[Event] = []
    again = False

    def vector(among: int) -> Vector:
        nonlocal again
        event = prepare.statistic(scenario, members=among)
        assert event is not None
        span = Span(units, taker.shapes, event)
        try:
            span.check_grid()
        except SettingError as error:
            raise Refusal(error.message) from error
        question = _question(run, client, event)
        if run.keeps and (before := run.answers.find(0, question)) is not None:
            again = True
            sums = wire_base.unpack_statistic(_again(run, client, wire.from_bytes(before)), taker.shapes)
        else:
            sums, _ = _taken(run, client, event, taker, span, question)
        paid.append(event)
        return span.vector(sums, Stream.fresh())

    try:
        made = masks.exchange(run, secure.MASKED, content, 0, vector)
    except Refusal as error:
        raise Refusal(str(error), error.event or (paid[0] if paid else None), error.own) from error
    wire.add_words(made, {"privacy": paid[0].to_json(), **({"again": True} if again else {})})
    return made


def _question(run: Serving, client: int, event: Event) -> str:
    """Differs where the site is asked for another statistic."""
    asked = Instruction(round=0, adapter={}, train=(), send=())
    return run.answers.question(asked, client, event, run.worker.dataset.fingerprint)


def _again(run: Serving, client: int, made: RecordDict) -> RecordDict:
    """What was answered before."""
    logger.info("asked again: answered as before", extra={"client": client, "run": run.key})
    wire.add_words(made, {"again": True})
    return made


def _taker(run: Serving) -> Taker:
    """What takes the statistic.

    Raises:
        Refusal: it cannot be taken of this base.
    """
    scenario, told = run.worker.scenario, run.worker.scenario.compress
    assert told is not None
    try:
        compressor = contract.load(told.use, {"keep": told.keep, **told.options})
        loaded, _ = compressing.load(scenario.model.base, scenario.model.revision, told.targets, told.exclude)
        return Taker(run.worker, compressing.asked_for(compressor, loaded).layers)
    except SettingError as error:
        raise Refusal(
            f"no statistic can be taken of its base ({error.key}): its log says why", own=str(error)
        ) from error


def _taken(
    run: Serving, client: int, event: Event, taker: Taker, span: Span | None, question: str
) -> tuple[Sums, RecordDict]:
    """The noised sums, which are paid for before a row is passed, and as an answer, which is kept.

    Args:
        run: that they are for.
        client: which one the site is.
        event: that they cost.
        taker: takes them.
        span: that they are cut to; None: they are not.
        question: that they answer.

    Raises:
        Refusal: the budget is not enough, or the rows cannot be passed.
    """
    worker = run.worker
    assert worker.pay is not None
    worker.pay(0, client, event)
    try:
        sums = taker.sums(client, Stream.fresh())
        sums = sums if span is None else span.cut(sums)
        units = worker.dataset.units(client)
        noised = mechanism(taker.asked.share, units, event.noise_multiplier).noised(sums, Stream.fresh())
    except Exception as error:  # whatever is wrong with its rows
        logger.exception("the statistic failed", extra={"client": client, "run": run.key})
        why = f"the statistic failed ({type(error).__name__}): site.log says more"
        raise Refusal("its statistic failed: its log says why", event, why) from error
    made = wire_base.pack_statistic(noised, event)
    if run.keeps:
        try:
            run.answers.keep(0, question, wire.to_bytes(made))
        except OSError as error:
            logger.warning("its answer cannot be kept, in case it is lost: %s", error.strerror or error)
    return noised, made


def base(scenario: Scenario, words: Words, content: RecordDict | None, folder: Path) -> Path | None:
    """The folder of the base that the server cut; None where the run's base is whole, or not cut yet.

    Args:
        scenario: that the server sent.
        words: of the introduction.
        content: of the message that it came in; None: it is one that is kept here.
        folder: of the run.

    Raises:
        Refusal: the factors did not come, or are no cut of the site's own copy.
        SettingError: the site has no such base.
    """
    mark, told = words.get(wire_base.CUT), scenario.compress
    if mark is None or told is None:
        return None
    made = folder / BASE
    if (made / located.MANIFEST).is_file() and smaller.manifest(made).get("mark") == mark:
        return made
    if content is None or wire_base.CUT not in content.array_records:
        raise Refusal(f"{STRANGER}: the smaller base of the run is not here")
    loaded, reader = compressing.load(scenario.model.base, scenario.model.revision, told.targets, told.exclude)
    weights = loaded.weights()
    try:
        came = wire_base.unpack_cut(content, {name: weight.shape for name, weight in weights.items()})
    except ContractError as error:
        raise Refusal(str(error)) from error
    exact = all(layer.weight.dtype.itemsize >= 4 for layer in loaded.layers.values())
    cuts = checked(came or {}, weights, _EXACT if exact else _ROUNDED)
    if made.exists():
        shutil.rmtree(made)
    about = {"use": told.use, "keep": told.keep, "base": scenario.model.base, "mark": str(mark)[:100]}
    compressing.assemble(made, loaded, reader, cuts, {**about, "statistic": None})
    return made


def checked(came: Change, weights: Mapping[str, Array], slack: float) -> dict[str, Cut]:
    """The cuts of layers, if they are of these weights.

    Args:
        came: of layers that were cut, the factors (out, k) and (k, in).
        weights: of all layers that may be cut, (out, in).
        slack: how far the factors may be off, relative to their length.

    Raises:
        Refusal: `left` has no orthonormal columns, or `right` is not `left^T W`, in the spectral norm: no
            direction of an input may come out longer than the slack allows.
    """
    cuts = {name: Cut((weight.shape[0], weight.shape[1])) for name, weight in weights.items()}
    for name, sides in came.items():
        weight, (left, right) = weights[name], map(np.array, sides)  # torch takes none that cannot be written
        if not _is_cut(left, right, weight, slack):
            raise Refusal(f"the factors that came for {name:.100} are no cut of its own copy of the base")
        lost = np.linalg.norm(weight - left @ right) / max(np.linalg.norm(weight), np.finfo(np.float32).tiny)
        cuts[name] = Cut(cuts[name].shape, left, right, error=float(lost))
    return cuts


def _is_cut(left: Array, right: Array, weight: Array, slack: float) -> bool:
    if not (left.shape[1] and np.isfinite(left).all() and np.isfinite(right).all()):
        return False
    far = np.linalg.norm(left.T @ left - np.eye(left.shape[1], dtype=np.float32), 2)
    off = np.linalg.norm(left.T @ weight - right, 2)
    return bool(far <= slack and off <= slack * np.linalg.norm(weight, 2))
