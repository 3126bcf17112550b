"""The commands of a deployment: `submit`, `survey`, `split` and `site`."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlora import options


def add(commands: Any) -> None:
    """Have a command line know them.

    Args:
        commands: the subparsers of argparse.
    """
    submit = commands.add_parser("submit", help="run a scenario on the sites of a Flower SuperLink")
    options.scenario(submit)
    submit.add_argument("--superlink", metavar="NAME", required=True, help="a connection in Flower's config.toml")
    submit.add_argument("--out", metavar="DIR", help="where the run folder comes (default: runs/<its name>)")
    submit.add_argument("--resume", metavar="NAME", help="go on with a run folder of the server")
    submit.add_argument("--key", metavar="FILE", help="ssh key that signs the run, for sites that ask who submits")
    submit.set_defaults(command=_submit)

    survey = commands.add_parser(
        "survey", help="ask sites how many rows of each label and length they hold, noised"
    )
    survey.add_argument("--superlink", metavar="NAME", required=True, help="a connection in Flower's config.toml")
    survey.add_argument("--wait", metavar="SECONDS", type=float, default=60.0, help="for all sites (default: 60)")
    survey.add_argument("--key", metavar="FILE", help="ssh key that signs, for sites that ask who asks")
    survey.add_argument("--json", action="store_true", help="print the answers as JSON")
    survey.set_defaults(command=_survey)

    split = commands.add_parser("split", help="write each client's examples and site file, to rehearse with")
    options.scenario(split)
    split.add_argument("--out", metavar="DIR", default="sites", help="a folder to make (default: sites)")
    split.add_argument("--as", metavar="PATH", dest="seen_as", help="where a node sees its own folder")
    split.set_defaults(command=_split)

    site = commands.add_parser(
        "site", help="what the owner of a site asks: what its file says, and what was asked of it"
    )
    asked = site.add_subparsers(metavar="WHAT", required=True)

    def about(name: str, what: str, command: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        """A command on a site file."""
        made: argparse.ArgumentParser = asked.add_parser(name, help=what)
        made.add_argument("site", metavar="SITE", help="the site's YAML file")
        made.set_defaults(command=command)
        return made

    check = about("check", "say what is wrong with a site file, and what was understood of it", _check)
    check.add_argument("--json", action="store_true", help="print what was understood as JSON")
    log = about("log", "list what was asked of a site: who, when, what it cost, why it was refused", _log)
    log.add_argument("--json", action="store_true", help="print the record's lines as JSON")
    page = about("report", "write a page of what was spent, by which runs, and what was refused", _page)
    page.add_argument("--out", metavar="FILE", help="the page (default: report.html in the site's state folder)")
    named = "name of the run, as fedlora site log prints it"
    forget = about("forget", "remove what a site keeps of a run, but never what the run spent", _forget)
    forget.add_argument("run", metavar="RUN", help=named)
    further = about("personalise", "train a run's adapter further on the site's own rows, privately", _personalise)
    further.add_argument("run", metavar="RUN", help=named)
    further.add_argument("--steps", metavar="N", type=int, default=50, help="steps of training (default: 50)")
    backup = about("backup", "copy what a site must not lose into one file, also beside a worker", _backup)
    to = "the file to make, outside of the state folder; - to print it"
    backup.add_argument("--out", metavar="FILE", required=True, help=to)
    backup.add_argument("--secret", metavar="FILE", help="encrypt it under the passphrase or key in this file")
    restore = about("restore", "put a backup back, so that nothing spent is counted too low", _restore)
    restore.add_argument("backup", metavar="FILE", help="what fedlora site backup wrote")
    restore.add_argument("--secret", metavar="FILE", help="the file that it was encrypted under")
    restore.add_argument("--merge", action="store_true", help="ledgers get the lines of both, the state's too")
    what = (
        "what may have been trained after the backup: none, RUN=ROUNDS, RUN=FILE (the submitter's ledger), "
        "RUN=all that it promised, or all, after which nothing is paid any more"
    )
    restore.add_argument("--lost", metavar="WHAT", nargs="+", default=[], help=what)
    steps = "steps of fedlora site personalise after the backup, of all runs; beside RUN=..."
    restore.add_argument("--personalised", metavar="STEPS", type=int, help=steps)
    answered = "surveys, and evaluations by the section figures, that were answered after the backup"
    restore.add_argument("--surveys", metavar="N", type=int, help=answered)


def _submit(arguments: argparse.Namespace) -> int:
    from fedlora import scenario
    from fedlora.reports.console import Live, summary_lines

    loaded = scenario.load(arguments.scenario, arguments.overrides)
    with Live() as display:
        from fedlora.deploy.submit import submit

        run = submit(
            loaded,
            arguments.superlink,
            out=Path(arguments.out) if arguments.out else None,
            resume=arguments.resume,
            key=Path(arguments.key) if arguments.key else None,
            display=display,
        )
    print("\n".join([*summary_lines(run), display.time_line()]))
    return 0


def _survey(arguments: argparse.Namespace) -> int:
    from fedlora.reports.console import Live

    with Live() as display:
        from fedlora.deploy.survey import lines, survey

        key = _path(arguments.key)
        answers = survey(arguments.superlink, wait=arguments.wait, key=key, display=display)
    if arguments.json:
        print(json.dumps([one.to_json() for one in answers], indent=2))
    else:
        print("\n".join(lines(answers)))
    return 0 if any(one.refused is None for one in answers) else 1


def _split(arguments: argparse.Namespace) -> int:
    from fedlora import scenario
    from fedlora.deploy.split import caps, split

    seen_as = Path(arguments.seen_as) if arguments.seen_as else None
    loaded = scenario.load(arguments.scenario, arguments.overrides)
    for file in split(loaded, Path(arguments.out), seen_as):
        print(file)
    for line in caps(loaded):
        print(line, file=sys.stderr)  # beside the files, which scripts read
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from fedlora.deploy.checking import check

    return check(Path(arguments.site)).told(arguments.json)


def _forget(arguments: argparse.Namespace) -> int:
    from fedlora.deploy.forgetting import forget
    from fedlora.errors import counted

    removed = forget(Path(arguments.site), arguments.run)
    print(f"{arguments.run}: {counted(removed, 'file')} removed; what it spent stays, and the name is refused")
    return 0


def _personalise(arguments: argparse.Namespace) -> int:
    from fedlora.deploy.personal import personalise

    made = personalise(Path(arguments.site), arguments.run, arguments.steps)
    print(made.folder)
    print(
        f"epsilon {made.before:.3f} before, {made.after:.3f} now; the site file allows {made.most:g}",
        file=sys.stderr,
    )
    return 0


def _backup(arguments: argparse.Namespace) -> int:
    from fedlora.deploy.backup import backup
    from fedlora.errors import counted

    to = sys.stdout.buffer if arguments.out == "-" else Path(arguments.out)
    made = backup(Path(arguments.site), to, _path(arguments.secret))
    paid = f"the account has {counted(made.rounds, 'paid round')}" if made.rounds else "there is no account yet"
    print(f"{arguments.out}: {counted(made.files, 'file')}; {paid}", file=sys.stderr)
    if not made.sealed:
        words = "it is not encrypted (--secret FILE does that): keep it as you keep the data"
        print(f"{arguments.out}: {words}", file=sys.stderr)
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    from fedlora.deploy.restoring import restore

    told = (Path(arguments.site), Path(arguments.backup), _path(arguments.secret))
    owed = (arguments.personalised, arguments.surveys)
    print("\n".join(restore(*told, arguments.lost, arguments.merge, *owed).lines()))
    return 0


def _path(given: str | None) -> Path | None:
    return Path(given) if given else None


def _page(arguments: argparse.Namespace) -> int:
    from fedlora.deploy.statement import report

    made = report(Path(arguments.site), Path(arguments.out) if arguments.out else None)
    print(made or "nothing was asked of this site yet, and no page was written: name one by --out")
    return 0


def _log(arguments: argparse.Namespace) -> int:
    from fedlora.deploy import history
    from fedlora.deploy.site import load

    lines = history.read(load(arguments.site).folder / history.NAME)
    print(json.dumps(lines, indent=2) if arguments.json else "\n".join(history.table(lines)))
    return 0
