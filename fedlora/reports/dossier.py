"""`fedlora dossier`: what a scenario does with data, for whoever has to agree to it and is no engineer.

The page says what leaves a client, who sees it, what epsilon promises and what it does not, what is kept and
where, and what to check before a site joins. It follows from the scenario alone; of a run it has the figures too.
"""

import time
from collections.abc import Iterator, Mapping
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedlora import plugins
from fedlora import scenario as scenarios
from fedlora.errors import UserError
from fedlora.record import Record
from fedlora.reports import meaning, page
from fedlora.reports.tables import Table

Told = Mapping[str, Any]
NAME = "dossier.html"


def dossier(what: str | Path, out: str | Path | None = None) -> Path:
    """Write the page, one HTML file that opens offline and prints on A4.

    Args:
        what: a scenario's file or name, or the folder of a run.
        out: the file; by default `dossier.html`, in the run's folder if it is one.

    Returns:
        The page.

    Raises:
        UserError: it is neither, the scenario is wrong, or the file cannot be written.
    """
    run = Record.open(what) if Path(what).is_dir() else None
    told = run.scenario if run is not None else scenarios.load(what).model_dump(mode="json")
    if not told:
        raise UserError(f"{what}: its scenario cannot be read")
    page.save(html(told, run), file := Path(out) if out else (run.folder if run else Path()) / NAME)
    return file


def html(told: Told, run: Record | None = None) -> str:
    """The page of a scenario as plain data, and of a run of it."""
    total, base = told["clients"]["total"], told["model"]["base"]
    made = page.Page(
        f"{told['name']}: what happens with the data",
        "fedlora · dossier",
        f"{total} clients fine-tune the language model {base} together. Their rows stay where they are.",
    )
    made.notices([*_notices(told)])
    made.section("What leaves a client", page.scrolled(_leaves(told).html(), "What leaves a client"))
    made.section("Who sees what", page.scrolled(_seen(told).html(), "Who sees what"), *_against(told))
    made.section("What epsilon means here", *_paragraphs(_promise(told, run)))
    made.section("What epsilon does not cover", _items(_uncovered(told)))
    made.section("What is kept, where, and how long", page.scrolled(_kept(told).html(), "What is kept"))
    made.section("The model", *_paragraphs(_model(told, run)))
    made.section("Before a site joins", _items(_checks(told)))
    now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    whence = "a scenario that was not run yet" if run is None else "a run and its records"
    return made.render(f"Made by fedlora {version('fedlora')} from {whence}, {now} UTC.")


def _paragraphs(sentences: Iterator[str]) -> Iterator[str]:
    return (f"<p>{escape(said)}</p>" for said in sentences)


def _items(sentences: Iterator[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(said)}</li>' for said in sentences)}</ul>"


def _example(told: Told) -> Told | None:
    """The guarantee for each example or person; None where there is none."""
    asked: Told = told.get("privacy") or {}
    return (asked or None) if asked.get("unit", "example") == "example" else asked.get("example")


def _own(told: Told) -> str:
    """Whom that guarantee is for: row or person."""
    return "person" if (_example(told) or {}).get("person") else "row"


def _unit(told: Told) -> str:
    """Whom epsilon is for: row, person or client; empty where there is none."""
    asked = told.get("privacy")
    if not asked:
        return ""
    return "client" if asked.get("unit") == "client" else "person" if asked.get("person") else "row"


def _notices(told: Told) -> Iterator[str]:
    if not told.get("privacy"):
        yield (
            "This scenario has no differential privacy. What clients send can tell much about single rows. "
            "Nothing on this page limits that."
        )
    elif _unit(told) == "client" and _example(told) is None:
        yield (
            "Noise is added to sums, after clients have sent their updates. A single row is not protected from "
            "whoever sees the update of its client."
        )


def _leaves(told: Told) -> Table:
    """What a client sends, when, and what protects it."""
    noise = {
        "row": "each row's part is clipped, then noise is added, before it leaves",
        "person": "each person's part, of all rows, is clipped, then noise is added, before it leaves",
        "client": "the whole change is clipped before it leaves; noise comes with the sum",
        "": "nothing",
    }[_unit(told)]
    if _unit(told) == "client" and _example(told):
        noise = f"each {_own(told)}'s part is clipped and noised before it leaves; {noise}"
    masked, honest = told.get("secure_aggregation"), meaning.honest_of(told)
    if honest is not None:
        noise = noise.replace("then noise is added,", "then a part of the noise is added,")
    if _unit(told) == "person" and (most := told["privacy"].get("rows_per_person")):
        noise += f"; a step takes {most} rows of a person at most"
    if masked:
        noise += "; masks: the server learns the sum of at least three clients and no single update"
    heads = "" if told["model"].get("head") == "frozen" else " and its output layer"
    rows = [[f"the change of a small adapter{heads}", "in each round that it takes part in", noise]]
    if (asked := told.get("statistics")) is not None:
        hides = f"each {_own(told)}'s part is bounded, and noise is added once, before it leaves"
        rows.append(
            [
                f"a statistic of its rows ({asked['kind']}), by which the base is made smaller",
                "once, before the first round",
                hides if _example(told) else "nothing",
            ]
        )
    held = f"{_own(told)}s"
    rows.append([f"how many {held} it holds", "when it joins", "nothing: the number counts as public"])
    if (told.get("privacy") or {}).get("share_metrics"):
        rows.append(["its training loss and number of rows", "in each round", "nothing"])
    if told["data"].get("client_test_share") is not None:
        guard = "a site can refuse it, or add noise that its own budget pays for; nothing elsewhere"
        rows.append(["figures of rows that it holds out", "in evaluated rounds", guard])
    rows.append(
        ["that it failed, without the reason", "when it fails", "the reason stays in the client's own log"]
    )
    return Table(("what", "when", "what protects it"), rows, left=frozenset({0, 1, 2}))


def _seen(told: Told) -> Table:
    """Who sees what of a client's rows, in the words of the promise."""
    unit, masked = _unit(told), told.get("secure_aggregation") is not None
    single = f"bounded by epsilon, for each {unit}" if _example(told) and unit != "client" else ""
    if unit == "client":
        single = f"bounded by an epsilon for each {_own(told)}" if _example(told) else ""
    update = "sums of several clients, masked" if masked else "every update by itself"
    open_ = "nothing bounds what it can learn"
    shared = masked and told["secure_aggregation"].get("noise") == "shared"
    if (honest := meaning.honest_of(told)) is not None:
        condition = f", if {honest:.0%} of those who send keep their noise from {{}}; otherwise by own_epsilon"
        single += condition.format("it")
    server = single or ("bounded by server_epsilon, for each client" if shared else open_)
    model = f"bounded by epsilon, for each {unit}" if unit else open_
    model += "" if honest is None else condition.format("them")
    rows = [
        ["the server, and who runs it", update, server],
        ["other clients", "the models that they are sent in their rounds", model],
        ["whoever gets the final model", "the model", model],
        ["the network between", "messages under TLS, if the deployment uses it", "nothing, with TLS"],
        ["the client itself", "its own rows and everything above that it is sent", "not limited"],
    ]
    return Table(("who", "sees", "what it can learn of the rows"), rows, left=frozenset({0, 1, 2}))


def _against(told: Told) -> Iterator[str]:
    if meaning.honest_of(told) is not None:
        said = (
            "The bound holds if the server follows the protocol. If it lies, or all others give it their noise, "
            "the larger own_epsilon holds: of the noise that a site itself adds and nobody can draw again."
        )
    elif _example(told) and _unit(told) != "client":
        said = (
            "At a site the bound holds even if the server lies: the site itself clips, adds noise that nobody can "
            "draw again, and counts what it has spent."
        )
    elif told.get("privacy"):
        said = "The bound holds if the server follows the protocol. It trusts that clients clip what they send."
    else:
        return
    yield f"<p>{said} A simulation on one machine protects nobody from that machine's owner.</p>"


def _promise(told: Told, run: Record | None) -> Iterator[str]:
    asked = told.get("privacy")
    if not asked:
        yield "There is no epsilon: the scenario has no privacy section."
        return
    spent = None if run is None else meaning.promise_of(run)
    masked = told.get("secure_aggregation") is not None
    if spent is not None:
        yield "These are the figures of the run, from its ledger."
        yield from meaning.in_words(spent, masked)
        return
    unit = {"row": "example"}.get(_unit(told), _unit(told))
    if asked.get("epsilon") is None:
        yield (
            f"The scenario sets the noise (noise_multiplier {asked['noise_multiplier']:g}) and no limit. "
            "fedlora plan says what epsilon it comes to."
        )
        return
    yield f"The run ends before epsilon passes {asked['epsilon']:g}. It is a limit; what is spent can be less."
    yield from meaning.in_words(
        meaning.Promise(asked["epsilon"], asked["delta"], unit, asked.get("person"), meaning.honest_of(told)),
        masked,
    )


def _uncovered(told: Told) -> Iterator[str]:
    unit = _unit(told)
    if unit:
        yield "Other runs on the same rows, and searches for settings. Each spends its epsilon, and they add up."
    if unit == "row":
        yield "A person with several rows: k rows have k times epsilon. With privacy.person persons are protected."
    if unit in ("row", "person"):
        yield f"The number of {unit}s that a client holds, and in which rounds it took part."
    if unit == "person":
        yield "A single row at that epsilon: taking one out can change a person's part by twice as much."
        yield "Rows of the same person at another client. Each client's promise is about its own rows."
    yield "What is true of everyone: a model can learn that a word goes with an illness, whoever takes part."
    files = told["data"].get("files") or {}
    if files and not files.get("test"):
        share, held = told["data"].get("test_share"), "persons" if unit == "person" else "rows"
        yield (
            f"Rows that judge the model: about {share:.0%} of the {held} of the same file. They are held out, and "
            "no promise covers them. With data.files.test the server has test rows of its own."
        )
    else:
        yield "Test rows of the server. They are not trained on, and count as public."
    yield "What people do with the model's answers."
    yield "How long a computation takes."


def _kept(told: Told) -> Table:
    steps = told["clients"].get("optimizer") or {}
    stays = isinstance(steps, Mapping) and steps.get("state") == "kept"
    rows = [
        ["the adapter, figures by round, the ledger", "the server's run folder", "as long as the model is used"],
        [
            "the ledger of what was spent",
            "each site's state folder",
            "as long as its rows may be used",
        ],
        ["its last answer, encrypted", "each site's state folder", "until the next round"],
        ["the scenario and what the run was", "each site's state folder", "until the site removes it"],
        ["the final adapter, if its site file asks", "each site's state folder", "until the site removes it"],
        ["a log without any text of a row", "each site's state folder", "by the site's own rule"],
        ["backups of that folder, without answers", "where the site puts them", "by the site's own rule"],
        [
            "rows as numbers (tokens)",
            "each site's cache folder",
            "until the site removes it; it is as private as the rows",
        ],
    ]
    if stays:
        rows.insert(3, ["the state of its optimiser", "each site's state folder", "until the site removes it"])
    return Table(("what", "where", "how long"), rows, left=frozenset({0, 1, 2}))


def _kind(told: Told) -> str:
    """The kind of adapter; what a strategy of one's own takes for auto is not asked: it is a program."""
    kind, use = told["model"]["adapter"].get("kind", "lora"), str(told["strategy"]["use"])
    kind = kind if isinstance(kind, str) else str(kind["use"])
    return (
        plugins.find("strategies", use).builds if kind == "auto" and use in plugins.names("strategies") else kind
    )


def _model(told: Told, run: Record | None) -> Iterator[str]:
    adapter = told["model"]["adapter"]
    where = "in all layers named below" if adapter.get("layers") is None else f"in layers {adapter['layers']}"
    targets = ", ".join(adapter["targets"]) if not isinstance(adapter["targets"], str) else adapter["targets"]
    yield (
        f"The base is {told['model']['base']}; it stays as it is. An adapter of kind "
        f"{_kind(told)} and rank {adapter['r']} is trained {where} ({targets}). The task is "
        f"{told.get('task', 'classification')}, the method {told['strategy']['use']}, in {told['rounds']} rounds."
    )
    if run is None or not run.summary:
        yield "It was not trained yet. fedlora simulate says how good it gets, and this page then has its figures."
        return
    metric, value = run.metric, run.summary.get(run.metric)
    said = f"On {run.summary.get('test_examples', 'the')} test rows its {metric} is "
    said += "not known" if value is None else f"{value:.3f}"
    if run.majority is not None:
        said += f"; always saying the commonest label has {run.majority:.3f}"
    yield f"{said}. It ran {run.summary.get('rounds', '?')} rounds."
    yield "The card beside the adapter (README.md) says how to load it and what it is for."


def _checks(told: Told) -> Iterator[str]:
    if (asked := _example(told)) is not None and asked.get("epsilon") is not None:
        yield (
            f"privacy.max_epsilon in the site file is the most that all runs together may spend; this one may "
            f"spend {asked['epsilon']:g}. fedlora site check says what is left."
        )
    else:
        yield "privacy in the site file: with it the site takes no run without differential privacy for its rows."
    if meaning.honest_of(told) is not None:
        yield (
            "The site's account counts what its own part of the noise promises, more than the epsilon on this "
            "page: a server that lies can have the others add none."
        )
    if _unit(told) == "person":
        yield "privacy.person in the site file names the column of persons; a site without it answers no such run."
    yield "accept.metrics is false: no loss and no figure of the site's rows leaves it."
    yield "accept.submitters lists who may start runs, by key; without it everyone who reaches the server may."
    yield f"accept.bases names the model ({told['model']['base']}); its files are on the site before the run."
    yield "accept.own_code is false: a run then brings no program of its own."
    yield "data.labels names the labels that a run may ask about, and no others."
    yield "The connection uses TLS with a certificate that the site has checked."
    yield "The epsilon on this page was agreed for these rows and this purpose, and that is written down."
