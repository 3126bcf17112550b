"""The commands of a deployment: `submit`, `split` and `site check`."""

import argparse
import json
import sys
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

    split = commands.add_parser("split", help="write each client's examples and site file, to rehearse with")
    options.scenario(split)
    split.add_argument("--out", metavar="DIR", default="sites", help="a folder to make (default: sites)")
    split.add_argument("--as", metavar="PATH", dest="seen_as", help="where a node sees its own folder")
    split.set_defaults(command=_split)

    site = commands.add_parser(
        "site", help="what the owner of a site asks: what its file says, and what was asked of it"
    )
    asked = site.add_subparsers(metavar="WHAT", required=True)
    check = asked.add_parser("check", help="say what is wrong with a site file, and what was understood of it")
    check.add_argument("site", metavar="SITE", help="the site's YAML file")
    check.add_argument("--json", action="store_true", help="print what was understood as JSON")
    check.set_defaults(command=_check)
    log = asked.add_parser(
        "log", help="list what was asked of a site: who, when, what it cost, why it was refused"
    )
    log.add_argument("site", metavar="SITE", help="the site's YAML file")
    log.add_argument("--json", action="store_true", help="print the record's lines as JSON")
    log.set_defaults(command=_log)
    page = asked.add_parser("report", help="write a page of what was spent, by which runs, and what was refused")
    page.add_argument("site", metavar="SITE", help="the site's YAML file")
    page.add_argument("--out", metavar="FILE", help="the page (default: report.html in the site's state folder)")
    page.set_defaults(command=_page)
    forget = asked.add_parser("forget", help="remove what a site keeps of a run, but never what the run spent")
    forget.add_argument("site", metavar="SITE", help="the site's YAML file")
    forget.add_argument("run", metavar="RUN", help="name of the run, as fedlora site log prints it")
    forget.set_defaults(command=_forget)


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
