"""Whether a site does what a server asks: versions, names, signatures, and the rules of the site file."""

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedlora.deploy import signing
from fedlora.deploy.serving import Words
from fedlora.deploy.site import Site
from fedlora.deploy.state import RUN, State
from fedlora.errors import Refusal, UserError
from fedlora.rounds.folder import same_run
from fedlora.scenario import Scenario

_VERSION = re.compile(r"([0-9]+[.][0-9]+)[.][0-9]+")


def _alike(there: str, here: str) -> bool:
    """Whether two versions are one, or differ in the patch alone."""
    one, other = _VERSION.fullmatch(there), _VERSION.fullmatch(here)
    return there == here or (one is not None and other is not None and one[1] == other[1])


def named(words: Words) -> str:
    """The name of what is asked, by a server of the same version but for a patch.

    Raises:
        Refusal: the version is another, or the name is none.
    """
    there, here = str(words.get("version")), version("fedlora")
    if not _alike(there, here):
        raise Refusal(f"it runs fedlora {here}, and the server {there:.20}: install one version on both sides")
    key = words.get("run")
    if not isinstance(key, str) or not RUN.fullmatch(key):
        raise Refusal("the run has no name that could be a folder's")
    return key


def signed(
    site: Site,
    app: Path,
    words: Words,
    what: Mapping[str, Any],
    remedy: str = "run: submit it by fedlora submit --key FILE",
) -> str | None:
    """The fingerprint of who signed what is asked; None where the site file names nobody who has to.

    Args:
        site: whose rules hold.
        app: of the Flower app, with the code that came along.
        words: with the name, and the signature.
        what: is signed beside the name and the app.
        remedy: what it is, and how it is signed.

    Raises:
        Refusal: nobody of those whom the site file names has signed it.
    """
    if (keys := site.accept.submitters) is None:
        return None
    signer = signing.signer(str(words.get("signature")), keys, what, str(words["run"]), app)
    if signer is None:
        raise Refusal(f"nobody whom it knows has signed this {remedy}")
    return signing.fingerprint(signer)


def admitted(site: Site | None, state: State, app: Path, words: Words, client: int) -> tuple[Scenario, str | None]:
    """The scenario of an introduction, if the site's rules allow it, and who signed it.

    Args:
        site: whose rules hold; None in Flower's own simulation.
        state: where it keeps what it knows of runs.
        app: of the Flower app, with the code that came with the run.
        words: of the introduction.
        client: which client the site is.

    Raises:
        Refusal: they do not.
    """
    key = named(words)
    if state.forgotten(key):
        raise Refusal("its owner had it forget the run of this name: submit it under another")
    if site is not None and (why := site.refuses_code(words.get("scenario"))):
        raise Refusal(f"its rules refuse the run: {why}")
    try:
        scenario = Scenario.model_validate(words["scenario"])
    except (KeyError, ValueError) as error:
        raise Refusal("it cannot read the scenario that the server sent") from error
    if site is None:
        if not 0 <= client < (total := scenario.clients.total):
            raise Refusal(f"it is client {client}, and the scenario has clients 0 to {total - 1}")
        return scenario, None
    labels = words.get("labels")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise Refusal("the server names no labels")
    if why := site.refuses(scenario) or site.refuses_labels(scenario, labels):
        raise Refusal(f"its rules refuse the run: {why}")
    signer = signed(site, app, words, words["scenario"])
    if (before := state.introduction(key)) is not None:
        try:  # what it keeps under a name is of one run: residuals of a plain one would spoil a private one
            same_run(state.folder, before["scenario"], words["scenario"])
        except (KeyError, UserError) as error:
            raise Refusal(
                "it knows another run by this name: a resumed one may change its rounds, and not much else"
            ) from error
    return scenario, signer
