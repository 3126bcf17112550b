"""The command line: parse, call, print. One line for each mistake of the user, exit code 2."""

import argparse
import os
import sys
from collections.abc import Sequence

from fedlora import options
from fedlora.deploy import commands as deployment


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = options.parsed(_parser(), argv)
    from fedlora.errors import FedloraError, UserError

    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # one's own strategies and clients are found here
    try:
        code: int = arguments.command(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except FedloraError as error:
        print(f"fedlora: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser(
        prog="fedlora",
        description="Fine-tune language models with low-rank adapters across clients that never share their "
        "data, under differential privacy, and say what that costs.",
    )
    options.version(parser)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    simulate = commands.add_parser("simulate", help="run a scenario on this machine or a Ray cluster")
    options.scenario(simulate)
    simulate.add_argument(
        "--baseline",
        choices=["pooled", "pooled_private", "alone"],
        help="run this instead: one model on all rows without privacy, or with; or each client by itself",
    )
    simulate.add_argument("--out", metavar="DIR", help="run folder (default: runs/<name>-<hash>)")
    simulate.add_argument("--resume", action="store_true", help="go on from the run folder's checkpoint")
    simulate.add_argument("--engine", choices=["inline", "ray"], help="where clients run (default: as it pays)")
    simulate.add_argument("--ray-address", metavar="A", help="join a running Ray cluster")
    simulate.set_defaults(command=_simulate)

    deployment.add(commands)

    check = commands.add_parser("check", help="say what is wrong with a scenario, and what was understood of it")
    options.scenario(check)
    check.add_argument("--json", action="store_true", help="print what was understood as JSON")
    check.set_defaults(command=_check)

    plan = commands.add_parser("plan", help="say what a scenario will cost: bytes, epsilon, time and memory")
    options.scenario(plan)
    plan.add_argument("--json", action="store_true", help="print all of it as JSON")
    plan.add_argument("--advise", action="store_true", help="find less noise for the same epsilon and examples")
    plan.set_defaults(command=_plan)

    report = commands.add_parser("report", help="write what a run did as one HTML file that opens offline")
    report.add_argument("run", metavar="RUN", help="a run folder")
    report.add_argument("--out", metavar="FILE", help="the file (default: report.html in the run folder)")
    options.drawn(report)
    report.add_argument("--share", action="store_true", help="leave out what epsilon does not cover")
    report.set_defaults(command=_report)

    page = commands.add_parser("dossier", help="what happens with the data, for whoever has to agree: a page")
    page.add_argument("what", metavar="SCENARIO|RUN", help="a scenario's file or name, or a run folder")
    page.add_argument("--out", metavar="FILE", help="the page (default: dossier.html, in a run's folder)")
    page.set_defaults(command=_dossier)

    compare = commands.add_parser("compare", help="runs side by side: a table, and a page that opens offline")
    compare.add_argument("runs", metavar="RUN", nargs="+", help="run folders; those of other seeds are averaged")
    compare.add_argument("--form", choices=["text", "markdown", "latex"], default="text", help="of the table")
    compare.add_argument(
        "--out", metavar="FILE", default="comparison.html", help="the page (default: comparison.html)"
    )
    compare.add_argument("--metric", metavar="NAME", help="compare by it (default: the task's own)")
    compare.add_argument(
        "--names",
        metavar="A,B",
        help="what rows are called, in order, with commas between (default: by what differs)",
    )
    options.drawn(compare)
    compare.set_defaults(command=_compare)

    sweep = commands.add_parser("sweep", help="many runs of a scenario: grids, random draws, early stopping")
    sweep.add_argument("sweep", metavar="SWEEP", help="a YAML file; started again, it goes on where it was")
    sweep.add_argument("--out", metavar="DIR", help="folder of its runs (default: sweeps/<name>)")
    options.overrides(sweep)
    sweep.set_defaults(command=_sweep)

    tune = commands.add_parser("tune", help="a short search of the learning rate; writes a scenario with the best")
    options.scenario(tune)
    rows = tune.add_mutually_exclusive_group()
    rows.add_argument("--public", metavar="ROWS", help="dataset or file to search on (default: data.public)")
    rows.add_argument("--private", action="store_true", help="search on the clients' own rows, at their epsilon")
    tune.add_argument("--out", metavar="FILE", help="the scenario to write (default: <scenario>.tuned.yaml)")
    tune.set_defaults(command=_tune)

    export = commands.add_parser("export", help="copy a run's adapter, or merge it into its base")
    export.add_argument("run", metavar="RUN", help="a run folder")
    export.add_argument("--out", metavar="DIR", help="a folder to make (default: <run>-adapter or <run>-merged)")
    export.add_argument("--merge", action="store_true", help="write the whole model instead of the adapter")
    options.own_code(export)
    export.add_argument("--push", metavar="REPO", help="upload it to the Hugging Face Hub, as you/name")
    export.set_defaults(command=_export)

    compress = commands.add_parser("compress", help="make a base model smaller, as a folder for model.base")
    options.compressed(compress)
    compress.set_defaults(command=_compress)

    predict = commands.add_parser("predict", help="ask a run's model about a text, or about the rows of a file")
    options.asked(predict, "--data", "texts", "its texts, two columns for pairs")
    pairs = predict.add_argument_group("of pairs", "the best texts of one file for each of another")
    pairs.add_argument("--all-pairs", metavar="FILE", help="the right texts; --data has the left ones")
    pairs.add_argument("--top", metavar="N", type=int, default=5, help="how many for each (default: 5)")
    more = "right texts that all left ones are scored against (default: 50)"
    pairs.add_argument("--anchors", metavar="N", type=int, default=50, help=more)
    pairs.add_argument("--label", metavar="LABEL", help="by which pairs are ranked (default: the last)")
    predict.set_defaults(command=_predict, use="predict")

    generate = commands.add_parser(
        "generate", help="let a run's model go on with prompts, or with those of a file"
    )
    options.asked(generate, "--prompts", "prompts", "its prompts")
    for name, kind, default, told in (
        ("--max-new-tokens", int, 64, "the most that it writes for each"),
        ("--temperature", float, 0.0, "0: the likeliest each time; above: drawn"),
        ("--top-p", float, 1.0, "draw of the likeliest tokens that have this share together"),
        ("--seed", int, 0, "of what is drawn"),
    ):
        generate.add_argument(name, type=kind, default=default, help=f"{told} (default: {default:g})")
    generate.set_defaults(command=_ask, use="generate")

    evaluate = commands.add_parser("evaluate", help="judge a run's model by the rows of a file")
    evaluate.add_argument("run", metavar="RUN", help="a run folder")
    evaluate.add_argument("--data", metavar="FILE", required=True, help="csv, tsv, json, jsonl or parquet")
    evaluate.add_argument(
        "--metrics", metavar="A,B", help="figures by name, with commas between (default: the run's own)"
    )
    evaluate.add_argument("--text", metavar="COLUMN", nargs="+", help="its texts, two columns for pairs")
    evaluate.add_argument("--label", metavar="COLUMN", help="its labels (default: columns as the run's own)")
    evaluate.add_argument("--json", action="store_true", help="print all of it as JSON")
    options.own_code(evaluate)
    evaluate.set_defaults(command=_evaluate)

    watch = commands.add_parser("watch", help="follow a run that another terminal started")
    watch.add_argument("run", metavar="RUN", help="a run folder")
    watch.set_defaults(command=_watch)

    init = commands.add_parser("init", help="make a small project: a scenario, your own strategy, its test")
    init.add_argument("folder", metavar="DIR", help="a folder to make")
    init.add_argument(
        "--data", metavar="FILE", help="learn from this csv, tsv, json, jsonl, parquet or conll file"
    )
    init.add_argument("--text", metavar="COLUMN", help="its texts; by default the column of the longest values")
    init.add_argument("--label", metavar="COLUMN", help="its labels; by default the column of the fewest values")
    init.add_argument("--task", metavar="TASK", help="what is learnt; by default what the columns look like")
    init.add_argument("--encoding", metavar="NAME", help="of its text, such as cp1252; by default UTF-8")
    init.set_defaults(command=_init)

    schema = commands.add_parser("schema", help="print the JSON Schema of scenarios, for editors")
    schema.set_defaults(command=_schema)

    explain = commands.add_parser("explain", help="say what a key of a scenario or of a site file is")
    explain.add_argument("key", metavar="KEY", nargs="?", help="such as clients.lr, clients or site.accept")
    explain.set_defaults(command=_explain)

    audit = commands.add_parser("audit", help="try to break a scenario's epsilon: a lower bound beside the claim")
    options.scenario(audit)
    audit.add_argument("--out", metavar="DIR", help="folder for figures and plot (default: audits/<name>-<hash>)")
    audit.add_argument("--canaries", type=int, default=4000, metavar="N", help="over all clients (default: 4000)")
    audit.set_defaults(command=_audit)

    account = commands.add_parser("ledger", help="verify a run's privacy ledger; epsilon by every accountant")
    account.add_argument("run", metavar="RUN", help="a run folder, or a privacy.jsonl")
    account.set_defaults(command=_ledger)

    listing = commands.add_parser("list", help="strategies, clients, tasks, kinds, datasets and more, a line each")
    shelves = "strategies clients tasks kinds schedules compressors metrics datasets scenarios sweeps".split()
    listing.add_argument("what", nargs="?", choices=shelves)
    listing.set_defaults(command=_list)
    return parser


def _print_json(told: object) -> None:
    import json

    from fedlora.returned import finite

    print(json.dumps(finite(told), indent=2))


def _simulate(arguments: argparse.Namespace) -> int:
    from fedlora import scenario
    from fedlora.reports.console import Live, summary_lines

    overrides = list(arguments.overrides)
    if arguments.engine:
        overrides.append(f"engine.kind={arguments.engine}")
    loaded = scenario.load(arguments.scenario, overrides)
    with Live() as display:
        from fedlora.simulation import simulate

        run = simulate(
            loaded,
            baseline=arguments.baseline,
            out=arguments.out,
            resume=arguments.resume,
            ray_address=arguments.ray_address,
            display=display,
        )
    print("\n".join([*summary_lines(run), display.time_line()]))
    cut_short = str(run.summary.get("stopped", "")).startswith("interrupted")
    return 130 if cut_short else 0 if run.summary["rounds"] else 1


def _check(arguments: argparse.Namespace) -> int:
    from fedlora import scenario
    from fedlora.checking import check

    return check(scenario.load(arguments.scenario, arguments.overrides), arguments.scenario).told(arguments.json)


def _plan(arguments: argparse.Namespace) -> int:
    from fedlora import scenario

    loaded = scenario.load(arguments.scenario, arguments.overrides)
    from fedlora.planning import plan

    told = plan(loaded, advise=arguments.advise).to_json()
    if arguments.json:
        _print_json(told)
    else:
        from fedlora.reports.planned import plan_lines

        print("\n".join(plan_lines(told)))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from fedlora.reports.single import report

    print(report(arguments.run, arguments.out, arguments.drawn, arguments.share))
    return 0


def _dossier(arguments: argparse.Namespace) -> int:
    from fedlora.reports.dossier import dossier

    print(dossier(arguments.what, arguments.out))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from fedlora.reports.comparison import compare

    names = None if arguments.names is None else [name.strip() for name in arguments.names.split(",")]
    made = compare(arguments.runs, arguments.out, arguments.metric, arguments.drawn, names)
    if arguments.form != "text":
        print(made.table().markdown() if arguments.form == "markdown" else made.table().latex())
        return 0
    told = [*made.sentences, ""] if made.sentences else []
    print("\n".join([*made.table().text(""), "", *told, *made.legend(), *made.notes, f"page: {arguments.out}"]))
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    from functools import partial

    from fedlora.sweep import sweep

    told = partial(print, file=sys.stderr, flush=True)
    done = sweep(arguments.sweep, arguments.out, told, arguments.overrides)
    print("\n".join(done.lines()))
    return 1 if done.summary["failed"] else 0


def _tune(arguments: argparse.Namespace) -> int:
    from functools import partial

    from fedlora.tuning import tune

    made = tune(
        arguments.scenario,
        overrides=arguments.overrides,
        public=arguments.public,
        private=arguments.private,
        out=arguments.out,
        told=partial(print, file=sys.stderr, flush=True),
    )
    print("\n".join(made.lines()))
    return 0 if made.best is not None else 1


def _export(arguments: argparse.Namespace) -> int:
    from fedlora.exporting import export, push
    from fedlora.run import Run

    run = Run.open(arguments.run)
    default = f"{run.folder.resolve()}-{'merged' if arguments.merge else 'adapter'}"
    folder = export(run, arguments.out or default, arguments.merge, own_code=arguments.own_code)
    print(folder)
    if arguments.push:
        print(push(folder, arguments.push))
    return 0


def _compress(arguments: argparse.Namespace) -> int:
    from fedlora.compressing import compress

    made = compress(**{name: value for name, value in vars(arguments).items() if name != "command"})
    print("\n".join(made.lines()))
    return 0


def _ask(arguments: argparse.Namespace) -> int:
    from fedlora.asking import ask

    print("\n".join(ask(**{name: value for name, value in vars(arguments).items() if name != "command"})))
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from fedlora.asking import ask, ask_pairs
    from fedlora.errors import UserError

    told = {name: value for name, value in vars(arguments).items() if name not in ("command", "use")}
    pairs = {name: told.pop(name) for name in ("all_pairs", "top", "anchors", "label")}
    if pairs["all_pairs"] is None:
        print("\n".join(ask("predict", **told)))
        return 0
    if told.pop("texts") or told["data"] is None:
        raise UserError("--all-pairs: takes the left texts from a file: name it by --data")
    lines, said = ask_pairs(**told, **pairs)
    print("\n".join(lines))
    print(said, file=sys.stderr)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from fedlora.evaluating import evaluate

    named = None if arguments.metrics is None else [name for name in arguments.metrics.split(",") if name]
    told = {"text": arguments.text, "label": arguments.label, "own_code": arguments.own_code}
    made = evaluate(arguments.run, arguments.data, named, **told)
    if arguments.json:
        _print_json(made.to_json())
    else:
        print("\n".join(made.lines()))
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from fedlora.reports.console import Live, follow, summary_lines
    from fedlora.run import Run

    with Live(Console(), shown=True) as display:
        run = follow(Run.open(arguments.run), display)
    if run.summary:
        print("\n".join(summary_lines(run)))
    return 0


def _init(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from fedlora import scaffold
    from fedlora.errors import UserError

    folder, data = Path(arguments.folder), arguments.data
    columns = (arguments.text, arguments.label, arguments.task, arguments.encoding)
    if data is None and any(columns):
        raise UserError("--text, --label, --task and --encoding are of --data FILE: name it")
    lines = scaffold.init(folder) if data is None else scaffold.of_data(folder, Path(data), *columns)
    print("\n".join(lines))
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from fedlora.scenario.schema import schema

    _print_json(schema())
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from fedlora.reference import lines

    print("\n".join(lines(arguments.key)))
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from fedlora import scenario
    from fedlora.audit import audit
    from fedlora.reports.console import Live

    loaded = scenario.load(arguments.scenario, arguments.overrides)
    with Live() as display:
        made = audit(loaded, out=arguments.out, canaries=arguments.canaries, display=display)
    print("\n".join(made.lines()))
    return 1 if made.refuted else 0


def _ledger(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from fedlora.privacy.ledger import statements

    print("\n".join(statements(Path(arguments.run))))
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from fedlora.listing import lines

    print("\n".join(lines(arguments.what)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
