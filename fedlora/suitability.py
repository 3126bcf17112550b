"""Whether a strategy can do what a scenario asks for, and which ones can."""

from collections.abc import Callable, Mapping

from fedlora import plugins, returned
from fedlora.adapter import Slot
from fedlora.compressors.contract import load as load_compressor
from fedlora.errors import SettingError
from fedlora.kinds.contract import Kind, Part
from fedlora.kinds.contract import load as load_kind
from fedlora.kinds.lora import Lora
from fedlora.scenario import Scenario
from fedlora.schedules import contract as schedules
from fedlora.schedules.contract import Schedule
from fedlora.strategy import Stock, Strategy
from fedlora.tasks import located

Test = Callable[[type[Strategy]], bool]  # of a strategy


def _of_factors(scenario: Scenario) -> str:
    """The key of a base whose frozen weights are factors; empty of others."""
    if (cut := scenario.compress) is not None:
        return "compress" if load_compressor(cut.use, {"keep": cut.keep, **cut.options}).factors else ""
    base = scenario.model.base
    return "model.base" if base != "minilm" and located.is_factored(base) else ""


def check_sites(strategy: Strategy, scenario: Scenario) -> None:
    """Refuse a scenario that sites and their server cannot carry out.

    Raises:
        SettingError: it asks for what only a simulation has, or names no rows that the server may judge by.
    """
    if scenario.world is not None:
        raise SettingError("world", "is of simulated devices: leave it out to run on sites")
    if (cut := scenario.compress) is not None:
        if not load_compressor(cut.use, {"keep": cut.keep, **cut.options}).factors:
            what = f"{cut.use} leaves parts out, and sites are sent factors alone: run fedlora compress, and name "
            raise SettingError("compress.use", f"{what}its folder as model.base at server and sites, or take lord")
        if scenario.statistics is not None and scenario.statistics.epsilon is None:
            raise SettingError(
                "statistics.epsilon", "the server would see each site's sum without noise: set privacy and this"
            )
    if scenario.model.mends:
        raise SettingError("model.quantize.start", "is of simulations yet: leave it out to run on sites")
    if strategy.tested:
        raise SettingError(
            "strategy.use", f"{scenario.strategy.use} is judged by the test set, which sites have not: simulate it"
        )
    if scenario.loss is not None and scenario.loss.class_weights == "balanced":
        raise SettingError("loss.class_weights", "counts test rows, which sites do not see: write weights")
    if scenario.data.files is not None and scenario.data.files.test is None:
        raise SettingError("data.files.test", "sites keep their rows: name the server's own file to judge by")


def check(strategy: Strategy, scenario: Scenario) -> None:
    """Refuse a strategy that cannot do what the scenario asks for.

    Raises:
        SettingError: with the reason, and the built-in strategies that can: nothing else of the scenario refuses
            these, unless it refuses all of them.
    """

    def those(test: Test) -> str:
        can = [name for name in plugins.names("strategies") if test(plugins.find("strategies", name))]
        return ", ".join([name for name in can if _fits(name, scenario)] or can)

    _check(strategy, scenario, those)


def _fits(name: str, scenario: Scenario) -> bool:
    try:
        _check(plugins.find("strategies", name)(), scenario, lambda test: "")
    except SettingError:
        return False
    return True


def _check(strategy: Strategy, scenario: Scenario, those: Callable[[Test], str]) -> None:
    use, told = scenario.strategy.use, scenario.clients
    if (cut := scenario.compress) is not None:
        load_compressor(cut.use, {"keep": cut.keep, **cut.options})
    schedule = schedules.load(scenario.model.adapter.schedule)
    levels = schedule is not None and schedule.unequal
    if told.unequal_ranks(scenario.model.adapter.r) and not (strategy.unequal_ranks or levels):
        can = those(lambda cls: cls.unequal_ranks)
        raise SettingError(
            "clients.ranks",
            f"{use} needs equal ranks; these take unequal ones: {can}, and so does model.adapter.schedule: "
            "{kind: nested}",
        )
    if strategy.merges and scenario.model.quantize is not None:
        can = those(lambda cls: not cls.merges)
        raise SettingError(
            "model.quantize", f"{use} adds to the frozen weights: leave it out, or take one of {can}"
        )
    if strategy.merges and (key := _of_factors(scenario)):
        can = those(lambda cls: not cls.merges)
        raise SettingError(key, f"{use} adds to the frozen weights, and here they are factors: take one of {can}")
    if strategy.merges and plugins.find("tasks", scenario.task).against_base:
        can = those(lambda cls: not cls.merges)
        raise SettingError(
            "strategy.use",
            f"{use} adds to the frozen weights, beside which task: {scenario.task} measures: take one of {can}",
        )
    if strategy.personal and not strategy.tested and scenario.data.client_test_share is None:
        raise SettingError(
            "strategy.use",
            f"{use} gives each client a model of its own, which needs examples of its own to be judged by: "
            "set data.client_test_share, such as 0.2",
        )
    for key, asked in (("keep", scenario.keep != "last"), ("stop", scenario.stop is not None)):
        if strategy.personal and asked:
            can = those(lambda cls: not cls.personal)
            raise SettingError(
                key,
                f"{use} gives each client a model of its own, and the server has none to try on rows of its own: "
                f"leave it out, or take one of {can}",
            )
    if not (strategy.linear and strategy.trips == 1):
        can = those(lambda cls: cls.linear and cls.trips == 1)
        if scenario.client_privacy is not None:
            raise SettingError(
                "strategy.use",
                f"unit: client noises a mean, and how much one client can change what {use} makes is unknown; "
                f"take one of {can}",
            )
        if scenario.secure_aggregation is not None:
            raise SettingError(
                "strategy.use", f"secure aggregation gives sums, and {use} needs each update; take one of {can}"
            )
    if scenario.shares_example_noise is not None and (why := _divides(strategy, scenario)):
        can = those(lambda cls: cls.linear and cls.trips == 1 and not _divides(cls(), scenario))
        raise SettingError("secure_aggregation.noise", f"shared noise protects sums, and {why}; take one of {can}")
    if told.averages_state and (strategy.personal or strategy.trips > 1):
        why = "gives each client a model of its own" if strategy.personal else f"makes {strategy.trips} trips"
        can = those(lambda cls: cls.trips == 1 and not cls.personal)
        raise SettingError(
            "clients.optimizer.state", f"{use} {why}: take kept or fresh, and not averaged, or take one of {can}"
        )
    if (stage := scenario.strategy.server) and not has_mean(strategy):
        raise SettingError(
            "strategy.server",
            f"{stage.kind} steps along a mean of changes, and what {use} makes is none: write strategy.server: "
            f"null (--set strategy.server=null), or take one of {those(has_mean)}",
        )
    if scenario.feeds_back and not (strategy.trips == 1 and (strategy.linear or isinstance(strategy, Stock))):
        can = those(lambda cls: cls.linear and cls.trips == 1)
        raise SettingError(
            "compression.up",
            f"what top_k leaves out is added to a later change, and {use} is no mean of changes: take one of "
            f"{can} or of Flower's own, or another kind",
        )
    if scenario.world is not None and strategy.trips > 1:
        raise SettingError("world", f"{use} makes {strategy.trips} trips in a round, and devices here make one")
    if scenario.world is not None and scenario.world.concurrency is not None and not _at_any_time(strategy):
        can = those(lambda cls: _at_any_time(cls()))
        raise SettingError(
            "world.concurrency",
            f"updates to older adapters go into a mean of changes, which {use} does not take; take one of {can}",
        )
    kind = scenario.model.adapter.named
    if kind != "auto" and (wrong := refuses(strategy, kind)):
        can = those(lambda cls: not refuses(cls, kind))
        what = f"{use} {wrong}: leave model.adapter.kind out, or take a strategy that goes with {kind}: {can}"
        raise SettingError("model.adapter.kind", what)
    made, width = kind_of(strategy, scenario), located.width(scenario.model.base)
    if isinstance(strategy, Stock):
        own = [role for role, part in made.parts.items() if part.trains]
        if {*strategy.parts} - {"head"} and not {*strategy.parts} & {*own}:
            raise SettingError(
                "strategy.parts",
                f"names nothing that trains of {plugins.called(type(made))}: write [{', '.join(own)}, head]",
            )
    if schedule is not None:
        _check_schedule(schedule, strategy, made, scenario, those)
    if scenario.model.start is not None and strategy.draw(2) != strategy.draw(1):
        can = those(lambda cls: cls().draw(2) == cls().draw(1))
        raise SettingError("model.start", f"{use} begins each round from new factors; take one of {can}")
    if scenario.model.mends:
        _check_mended(strategy, scenario, made, those)
    if width is not None:
        made.check_rank(f"a weight of {scenario.model.base}", width, width)


def _check_mended(strategy: Strategy, scenario: Scenario, kind: Kind, those: Callable[[Test], str]) -> None:
    """Refuse what cannot begin with what rounding lost, or would count that as learnt.

    Raises:
        SettingError: with the reason, and what goes.
    """
    use, model, key = scenario.strategy.use, scenario.model, "model.quantize.start"
    if type(kind) is not Lora:
        raise SettingError(
            key, f"lq begins with a plain LoRA, and this is {plugins.called(type(kind))}: leave it out"
        )
    if strategy.draw(2) != strategy.draw(1) or strategy.personal:
        can = those(lambda cls: cls().draw(2) == cls().draw(1) and not cls.personal)
        raise SettingError(key, f"lq is one beginning for all, which {use} has not: take one of {can}")
    for other, asked in (
        ("model.start", model.start is not None),
        ("model.adapter.schedule", model.adapter.schedule is not None),
        (f"task: {scenario.task}", plugins.find("tasks", scenario.task).against_base),
    ):
        if asked:
            raise SettingError(key, f"lq goes not with {other}: leave one of them out")


def _check_schedule(
    schedule: Schedule, strategy: Strategy, kind: Kind, scenario: Scenario, those: Callable[[Test], str]
) -> None:
    """Refuse a schedule of the adapter that the strategy, the kind of adapter or another key does not allow.

    Raises:
        SettingError: with the reason, and what goes.
    """
    use, told = scenario.strategy.use, scenario.model.adapter.schedule
    name, key = getattr(told, "kind", ""), "model.adapter.schedule"
    if not has_mean(strategy) or strategy.personal:
        can = those(lambda cls: has_mean(cls) and not cls.personal)
        raise SettingError(
            key, f"{name} goes on from a mean of changes, and what {use} makes is none: take one of {can}"
        )
    layout = {role: Slot(role, (1, 1), role, "x", kind.trains(role)) for role in (*kind.parts, "head")}
    trained = {n for round in (1, 2) for n in strategy.trains(round, layout) if layout[n].trainable}
    if wrong := schedule.refuses(kind, trained):
        raise SettingError(key, f"{name}: {wrong}; leave it out, or take kind: core")
    model, tiers = scenario.model, scenario.clients.unequal_ranks(scenario.model.adapter.r)
    merges, changes = schedule.merges, schedule.narrows or model.adapter.rank(1) < model.adapter.r
    parts = schedule.narrows or schedule.unequal
    if schedule.unequal and not changes and not tiers:
        raise SettingError("clients.ranks", f"{name} is for clients of several ranks: name them, or their tiers")
    for at, asked, why in (
        (
            "model.quantize",
            merges and model.quantize is not None,
            "adds to the frozen weights, and those are in few bits",
        ),
        (
            _of_factors(scenario),
            merges and _of_factors(scenario) != "",
            "adds to the frozen weights, and here they are factors",
        ),
        ("model.start", merges and model.start is not None, "draws new factors, and these begin from other ones"),
        ("model.start", changes and model.start is not None, "begins with less than that has"),
        (
            "strategy.use",
            merges and plugins.find("tasks", scenario.task).against_base,
            f"adds to the frozen weights, beside which task: {scenario.task} measures",
        ),
        (
            "compression.up",
            (merges or parts) and scenario.feeds_back,
            "begins anew, and what top_k left out is of what there was before",
        ),
        (
            "clients.optimizer.state",
            (merges or changes) and scenario.clients.keeps_state,
            "begins anew, and moments that clients keep do not",
        ),
        (
            "world.concurrency",
            (merges or parts) and scenario.world is not None and scenario.world.concurrency is not None,
            "begins anew, and updates that come late are to what there was before",
        ),
        (
            "privacy.unit",
            tiers and scenario.client_privacy is not None,
            "has ranks, and a noised sum has one shape",
        ),
        (
            "secure_aggregation",
            tiers and scenario.secure_aggregation is not None,
            "has ranks, and a masked sum has one shape",
        ),
        (
            "secure_aggregation.noise",
            schedule.narrows and scenario.shares_example_noise is not None,
            "lets some layers rest, and sites that share noise out train what the strategy names",
        ),
        (
            "strategy.shrink",
            schedule.unequal and scenario.strategy.shrink is not None,
            "gives numbers noise of their own, and shrinking takes one size",
        ),
    ):
        if asked:
            raise SettingError(at, f"model.adapter.schedule: {name} {why}: leave one of them out")


def has_mean(strategy: Strategy | type[Strategy]) -> bool:
    """Whether all that a round makes is a mean of changes, which `strategy.server` can step along."""
    return strategy.linear and strategy.trips == 1 and not strategy.merges


def _divides(strategy: Strategy, scenario: Scenario) -> str | None:
    """Why a sum of what clients send is not one step under the sum of their noise; None where it is."""
    use, cls = scenario.strategy.use, type(strategy)
    if cls.keeps is not Strategy.keeps:
        return f"{use} keeps tensors with clients, which only their own part of the noise protects"
    if cls.reply is not Strategy.reply or "turns" in strategy.config(1):
        return f"{use} does more with a step than send it"
    if scenario.clients.unequal_ranks(scenario.model.adapter.r):
        return "clients of a lower rank (clients.ranks) add none to numbers that they have not"
    return None


def means() -> str:
    """The built-in strategies of which that is so."""
    return ", ".join(name for name in plugins.names("strategies") if has_mean(plugins.find("strategies", name)))


def refuses(strategy: Strategy | type[Strategy], kind: str) -> str | None:
    """Why a strategy does not work on a kind of adapter; None where it does."""
    found = plugins.find_of("kinds", kind, Kind)  # type: ignore[type-abstract]
    parts: Mapping[str, Part] = found.parts
    if missing := [role for role in strategy.moves if role not in parts or not parts[role].trains]:
        return f"moves {' and '.join(strategy.moves)}, and {kind} has no {' or '.join(missing)} that can train"
    if strategy.linear and strategy.facts.exact:
        made = strategy() if isinstance(strategy, type) else strategy
        layout = {role: Slot(role, (1, 1), role, "x") for role, part in parts.items() if part.trains}
        if not found(1, 1.0, ()).exact([*made.trains(1, layout)]):
            return f"promises exact averages, and the change of {kind} is not linear in what it trains"
    return None


def _at_any_time(strategy: Strategy) -> bool:
    """Whether updates of several rounds have one mean: it is linear, and each round is about the same tensors."""
    layout = {name: Slot(name, (1, 1), name, "x") for name in ("A", "B", "core", "head")}
    first, second = ([*map(set, (strategy.trains(r, layout), strategy.sends(r, layout)))] for r in (1, 2))
    return strategy.linear and strategy.trips == 1 and first == second and strategy.draw(1) == strategy.draw(2)


def check_bound(strategy: Strategy) -> None:
    """Make sure that a bound strategy trains something of its model.

    Raises:
        SettingError: it does not.
    """
    layout = strategy.layout
    for what, named in (("federates", strategy.federates(layout)), ("trains", strategy.trains(1, layout))):
        names = returned.names(returned.who(strategy, what), named)
        if strange := sorted(set(names) - set(layout)):
            raise SettingError("strategy.use", f"{what} {strange[0]!r}, which the adapter does not have")
    if not any(layout[name].trainable for name in strategy.trains(1, layout)):
        raise SettingError("strategy.use", "trains no tensor of this adapter")


def name_of_kind(strategy: Strategy, kind: str) -> str:
    """The kind that `model.adapter.kind` comes to under a strategy."""
    return strategy.builds if kind == "auto" else kind


def kind_of(strategy: Strategy, scenario: Scenario) -> Kind:
    """The kind of adapter that a scenario and its strategy ask for."""
    told = scenario.model.adapter
    name = name_of_kind(strategy, told.named)
    options = {} if isinstance(told.kind, str) else told.kind.options
    return load_kind(name, told.r, told.alpha, told.targets, told.layers, told.exclude, told.rslora, options)
