"""`fedlora site forget`: remove what a site keeps of a run, and never what it spent."""

from pathlib import Path

from fedlora.deploy import history
from fedlora.deploy.history import History
from fedlora.deploy.site import load
from fedlora.deploy.state import RUN, State
from fedlora.errors import UserError, suggestion
from fedlora.privacy import lock


def forget(file: Path, key: str) -> int:
    """Remove the files of a run: what was answered, trained and merged, its introduction, what was judged.

    The run's own ledger stays, and so do its lines in the site's account and in the record of what was asked. A
    run of that name is refused from then on: whoever is asked about it again would otherwise train with noise
    and rows drawn anew, and could be asked for what was told only once.

    Args:
        file: the site's YAML file.
        key: name of the run.

    Returns:
        How many files were removed.

    Raises:
        UserError: there is no such run, a worker is up, or a file cannot be removed.
    """
    site = load(file)
    state = State(site.folder)
    if not RUN.fullmatch(key) or not state.of_run(key).is_dir():
        held_here = state.runs()
        what = suggestion(key, held_here) if held_here else "it holds none, and nothing is to be forgotten"
        raise UserError(f"{site.folder / 'runs'}: holds no run {key!r}: {what}")
    held = lock.hold(site.folder / "lock")
    try:
        removed = state.forget(key)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be removed: {error.strerror}; run this again") from error
    History(site.folder).write(history.FORGOTTEN, history.ANSWERED, run=key)
    del held  # not before
    return removed
