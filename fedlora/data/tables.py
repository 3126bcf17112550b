"""Tables on disk: csv, tsv, json, jsonl, parquet, and CoNLL files."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.data import tagged
from fedlora.errors import SettingError


def read_table(key: str, path: Path, columns: Sequence[str] | None) -> Any:
    """A file as a data frame; cells of a csv or tsv are text.

    Args:
        key: of the scenario, that names the file.
        path: of the file.
        columns: names for a file without a header.

    Raises:
        SettingError: it cannot be read.
    """
    import pandas as pd

    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # a row longer than the names
                return pd.read_csv(
                    path,
                    sep="," if suffix == ".csv" else "\t",
                    dtype=str,
                    na_filter=False,
                    encoding="utf-8",
                    names=list(columns) if columns else None,
                    header=None if columns else 0,
                    index_col=False,  # else the first column is taken for it where a name is missing
                )
        if suffix in (".json", ".jsonl"):
            return pd.read_json(path, lines=suffix == ".jsonl", dtype=False)
        if suffix == ".parquet":
            return pd.read_parquet(path)
        if suffix in tagged.SUFFIXES:
            return pd.DataFrame(tagged.read_conll(key, path, columns))
    except SettingError:
        raise
    except FileNotFoundError as error:
        raise SettingError(key, f"no such file: {path}") from error
    except Exception as error:  # each reader has errors of its own
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingError(key, f"{path} is not readable as {suffix[1:]}: {what}") from error
    kinds = ", ".join((".csv", ".tsv", ".json", ".jsonl", ".parquet", *tagged.SUFFIXES))
    raise SettingError(key, f"{path}: {suffix or 'no suffix'} is not one of {kinds}")
