"""Names of labels: which are labels, and which a reader takes for one and a computer for several."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from fedlora.data.rows import Rows
from fedlora.errors import SettingError, cut

_SHOWN = 5  # groups of labels
_NUMBER = re.compile(r"[-+]?\d{1,300}(\.\d*)?", re.ASCII)
_HIDDEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u3164\ufe00-\ufe0f\uffa0]")  # no blank, and not seen
_UNSEEN = ("Cf", "Cc")  # among them zero-width ones and a byte order mark


def alike(names: Sequence[str]) -> Iterator[str]:
    """Labels that are likely meant as one, a line for each group of them."""
    for same, what in ((bare, "blanks, case or hidden signs"), (folded, "how a number is written")):
        groups: dict[str, list[str]] = defaultdict(list)
        for name in names:
            groups[same(name)].append(name)
        several = [group for group in groups.values() if len(group) > 1 and (same is bare or _apart(group))]
        for group in several[:_SHOWN]:
            shown = ", ".join(repr(cut(name)) if _seen(name) else ascii(cut(name)) for name in group)
            yield f"labels {shown} differ by {what} alone, and are {len(group)} classes: write them alike"


def bare(name: str) -> str:
    """A name without what a reader hardly sees: blanks, case, invisible marks, and how letters are composed."""
    seen = "".join(c for c in name if c.isspace() or not (_HIDDEN.match(c) or unicodedata.category(c) in _UNSEEN))
    return unicodedata.normalize("NFC", " ".join(seen.split()).casefold())


def meant(name: str, known: Sequence[str]) -> str | None:
    """Which of the labels a name is likely a slip of: one that differs by a letter or two, and in no digit."""
    plain = {bare(label): label for label in known}
    near = get_close_matches(own := bare(name), plain, n=1, cutoff=0.8)
    return plain[near[0]] if near and re.sub(r"\D", "", near[0]) == re.sub(r"\D", "", own) else None


def _seen(name: str) -> bool:
    """Whether a name shows all that it holds."""
    return name.isprintable() and not _HIDDEN.search(name) and unicodedata.is_normalized("NFC", name)


def folded(name: str) -> str:
    """One spelling of all that a reader takes for one name: `bare`, and a number as it is read."""
    plain = bare(name)
    return repr(float(plain)) if _NUMBER.fullmatch(plain) else plain


def _apart(names: Sequence[str]) -> bool:
    return len({*map(bare, names)}) > 1


def check_names(key: str, names: Sequence[str], count: int) -> None:
    """Make sure that names are of classes, and neither scores nor texts; none of them is shown.

    Args:
        key: of the column.
        names: of the labels.
        count: of rows.

    Raises:
        SettingError: they are numbers with fractions, or nearly as many as rows.
    """
    if len(names) > 1 and all(map(_SCORE.fullmatch, names)) and any("." in name for name in names):
        raise SettingError(
            key,
            f"holds {len(names)} different numbers with fractions, as scores are: write task: regression with "
            "data.score, or name them in data.labels if they are names",
        )
    if len(names) > max(_FEW, count / 2):
        raise SettingError(
            key,
            f"has {len(names)} different values in {count} rows, as no column of labels has: name another, or "
            "write task: causal_lm to learn texts",
        )


_FEW = 20  # labels, of which no number of rows is too few
_SCORE = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", re.IGNORECASE)


def check_labels(key: str, rows: Rows, names: Sequence[str], what: str) -> None:
    """Make sure that rows have no other labels than those named.

    Raises:
        SettingError: of `key`, with `what` is wrong; they have.
    """
    if names and (strange := sorted(rows.classes - set(names))):
        alike = {*map(bare, names)}
        hint = (
            "; some differ from them by blanks, case or hidden signs alone"
            if alike & {*map(bare, strange)}
            else ""
        )
        raise SettingError(key, f"{what}: {[cut(name) for name in strange[:5]]}{hint}")
