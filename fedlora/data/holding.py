"""Which rows are held out: by a hash of each text, so that equal texts stay together, whatever the seed.

Where persons are protected their names take the place of texts: no person is in both parts.

A text is held out by its own hash alone, and stays so as rows come and the share grows. Two things go before that:
no label and no owner is held out whole, and where few texts stand many times the share is met by those that fit.
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Collection, Hashable, Sequence

from fedlora.errors import SettingError, counted, cut

logger = logging.getLogger(__name__)

_LEAST = 0.1  # of a row that is asked for: below it none is held out
_SHORT = 0.1  # share of the rows that are asked for, from which it is told that fewer are held out
_BY_CHANCE = 4.0  # standard deviations of a draw of different texts: further off, texts are chosen to fit


def hold_out(
    texts: Sequence[bytes],
    share: float,
    kinds: Sequence[Collection[Hashable]],
    again: bool,
    what: str,
    of: str = "texts",
) -> list[bool]:
    """Of each row whether it is held out.

    Args:
        texts: of the rows.
        share: of them to hold out.
        kinds: of each row what should not be held out whole: its labels, and whose it is.
        again: what is split was split off itself: by other bytes of the hash.
        what: the key that says the share, for what is logged.
        of: what `texts` are, for the same.
    """
    at = slice(4, 8) if again else slice(4)
    number = {text: int.from_bytes(hashlib.sha1(text).digest()[at], "big") for text in dict.fromkeys(texts)}
    count, asked = Counter(texts), share * len(texts)
    chosen = {text for text, n in number.items() if n < int(share * 2**32)}
    order = sorted(number, key=lambda text: (number[text], text))
    _spare(chosen, order, texts, kinds)
    chance = _BY_CHANCE * math.sqrt(len(texts) * share * (1 - share))
    none = not chosen and asked >= _LEAST
    if none or len(chosen) == len(number) or abs(sum(count[text] for text in chosen) - asked) > chance:
        chosen, left = set(), max(round(asked), 1)
        bound = _bound(texts, kinds)
        for text in order:
            if count[text] <= left and _free(text, bound, chosen) and len(chosen) < len(number) - 1:
                chosen.add(text)
                left -= count[text]
        chance = 1.0
    held = sum(count[text] for text in chosen)
    off = abs(held - asked) >= chance or asked - held >= max(1.0, _SHORT * asked)
    if held and off and len(number) < len(texts):
        logger.warning(
            "%s asks for %.0f of %d rows, and %d are held out: the rows have %d different %s, equal ones "
            "stay together, and no label is held out whole",
            *(what, asked, len(texts), held, len(number), of),
        )
    elif held and off:
        logger.warning(
            "%s asks for %.0f of %d rows, and %d are held out: a hash of each row decides, as a coin would, and "
            "of few rows the number is off by chance; name a file of test rows for a fixed number",
            *(what, asked, len(texts), held),
        )
    return [text in chosen for text in texts]


def no_person_fits(persons: Sequence[str], share: float, column: str) -> SettingError:
    """That none of the persons can be held out with all of their rows, and why.

    Args:
        persons: of each row.
        share: of the rows to hold out.
        column: that says who is who.
    """
    count, asked = Counter(persons), max(round(share * len(persons)), 1)
    if (least := min(count.values())) > asked:
        why = f"data.test_share asks for {counted(asked, 'row')}, and none of them has fewer than {least}"
    else:
        why = "each label and client keeps one of them to train on"
    return SettingError(
        "privacy.person",
        f"the test set is empty: {counted(len(persons), 'row')} are of {counted(len(count), 'person')} by "
        f"{cut(column)!r}, each stays whole, and {why}: name test "
        "rows (data.files.test), or a column of more persons",
    )


Bound = tuple[dict[bytes, set[Hashable]], dict[Hashable, set[bytes]]]


def _bound(texts: Sequence[bytes], kinds: Sequence[Collection[Hashable]]) -> Bound:
    """The kinds of each text, and the texts of each kind."""
    of_text: dict[bytes, set[Hashable]] = {}
    of_kind: dict[Hashable, set[bytes]] = {}
    for text, held in zip(texts, kinds, strict=True):
        of_text.setdefault(text, set()).update(held)
        for kind in held:
            of_kind.setdefault(kind, set()).add(text)
    return of_text, of_kind


def _free(text: bytes, bound: Bound, chosen: set[bytes]) -> bool:
    """Whether each kind of a text keeps another text if this one is held out too."""
    of_text, of_kind = bound
    return all(of_kind[kind] - chosen - {text} for kind in of_text[text])


def _spare(
    chosen: set[bytes], order: Sequence[bytes], texts: Sequence[bytes], kinds: Sequence[Collection[Hashable]]
) -> None:
    """Take back, of each kind that would be held out whole, the text that would be the last to go."""
    left = {kind for text, held in zip(texts, kinds, strict=True) if text not in chosen for kind in held}
    whole = {kind for held in kinds for kind in held} - left
    if not whole:
        return
    of_text, _ = _bound(texts, kinds)
    for text in reversed(order):
        if text in chosen and of_text[text] & whole:
            chosen.discard(text)
            whole -= of_text[text]
