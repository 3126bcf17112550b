"""Options that several commands share, and how a line of them is read."""

import argparse
from collections.abc import Sequence
from typing import Any

from fedlora.errors import suggestion


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviation for an option, and whose commands take none either."""

    def __init__(self, **told: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **told})

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """One line for a command that there is not."""
        if action.dest == argparse.SUPPRESS and action.choices is not None and value not in action.choices:
            self.exit(2, f"{self.prog}: unknown command {value!r}: {suggestion(value, action.choices)}\n")
        super()._check_value(action, value)


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """A command line as `parse_args` reads it; texts may stand after options, too."""
    told, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(told, "texts") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        told.texts = [*told.texts, *rest]
    return told


def scenario(parser: argparse.ArgumentParser) -> None:
    """A scenario, with overrides."""
    parser.add_argument("scenario", metavar="SCENARIO", help="a YAML file, or the name of one that ships here")
    overrides(parser)


def drawn(parser: argparse.ArgumentParser) -> None:
    """Where charts are written as files."""
    parser.add_argument("--figures", metavar="DIR", dest="drawn", help="write the charts as SVG, PDF and PNG here")


def own_code(parser: argparse.ArgumentParser) -> None:
    """Consent to the run's own task."""
    parser.add_argument("--own-code", action="store_true", help="import the run's own task: it is a program")


def asked(parser: argparse.ArgumentParser, file: str, what: str, columns: str) -> None:
    """What a finished run is asked: words of the command line, or a file."""
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("texts", metavar="TEXT", nargs="*", help=f"{what}, before --text")
    parser.add_argument(file, metavar="FILE", dest="data", help="txt, csv, tsv, json, jsonl or parquet")
    parser.add_argument("--text", metavar="COLUMN", nargs="+", help=f"{columns} (default: as the run's own)")
    parser.add_argument("--out", metavar="FILE", help="write answers here: jsonl, csv or tsv")
    own_code(parser)


def compressed(parser: argparse.ArgumentParser) -> None:
    """What base is made smaller, and how."""
    parser.add_argument("base", metavar="BASE", help="a folder, a Hub id, or minilm")
    parser.add_argument("--use", metavar="NAME", required=True, help="a compressor of fedlora list compressors")
    parser.add_argument(
        "--keep", type=float, default=0.7, metavar="SHARE", help="of numbers, units or blocks (default: 0.7)"
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub id")
    parser.add_argument("--texts", metavar="FILE", help="public texts for the statistic: a txt, or a table")
    parser.add_argument("--column", metavar="NAME", help="of texts in tables (default: the first)")
    parser.add_argument("--statistic", choices=["gram", "mean"], help="of the texts (default: as NAME takes it)")
    parser.add_argument("--perplexity", metavar="FILE", help="texts to judge the base by, before and after")
    for name, told in (("targets", "layers to cut (default: all-linear)"), ("exclude", "layers that stay")):
        default = ["all-linear"] if name == "targets" else []
        parser.add_argument(f"--{name}", metavar="LAYER", nargs="+", default=default, help=told)
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a text (default: 128)")
    parser.add_argument("--whole", action="store_true", help="multiply the factors out, for transformers")
    parser.add_argument("--out", metavar="DIR", required=True, help="a folder to make")


def overrides(parser: argparse.ArgumentParser) -> None:
    """Settings that override those of the file."""
    parser.add_argument(
        "--set", metavar="a.b=v", action="append", default=[], dest="overrides", help="override a setting"
    )


def version(parser: argparse.ArgumentParser) -> None:
    """The installed version, which is looked up only then."""
    parser.add_argument("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="print the version")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"fedlora {version('fedlora')}")
        parser.exit()
