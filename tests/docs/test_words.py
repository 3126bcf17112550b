"""The docs are written in plain words: short sentences, and the terms that the field uses.

Each page is read without its code, tables and headings. A paragraph or a list item is a piece of text, which is
split into sentences; a link counts as its text, and a piece of code as one word.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from proselint.checks import __register__
from proselint.config import DEFAULT, Config
from proselint.registry import CheckRegistry
from proselint.tools import LintFile

ROOT = Path(__file__).parents[2]
LONGEST = 35  # words
EXCEPTIONS: set[str] = set()  # ten at most
PAGES = {
    str(file.relative_to(ROOT)): file.read_text()
    for file in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}

# Of proselint's checks: signs of typography are the site's, and figures of p and ranges of dates are no prose.
LINT: Config = {
    **DEFAULT,
    "checks": {**DEFAULT["checks"], "typography": False, "psychology": False, "dates_times": False},
}

# What was written in words of our own, and what the field says. Patterns are of lower-case text without code.
PLAIN = {
    r"(?<!learning )(?<!sampling )(?<!sample )(?<!dropout )(?<!alarm )\brates?\b": "learning rate, sampling rate",
    r"\btold\b(?! apart)": "reported, stated, set",
    r"\b(tells?|telling) (apart|bytes|epsilon|the epsilon|no|what|of)\b": "distinguish, report, print",
    r"\bfronts?\b": "Pareto front, best trade-offs",
    r"\brests? on\b": "depends on",
    r"\bin (the )?place of\b": "instead of",
    r"\bdeals? (them |the examples )?out\b|\bdealt\b": "distributes, assigned",
    r"\banew\b": "again, new",
    r"\bby existing\b": "automatically",
    r"\b(somebody|one|our)'s own\b|\bof (one|somebody)'s own\b": "your own, custom",
    r"\bas ever\b|\bsince then\b|\buntil then\b|\bno longer multiplied\b": "what is so, without its history",
    r"\b(in|by|of|from) 0\.\d+\.\d+\b": "what is so: versions are the CHANGELOG's",
    r"\bcounts with whoever\b|\bwhoever\b": "anyone who, the person who",
    r"\bflatters?\b": "overstates",
    r"\bhand in hand\b|\bto the bit\b": "bit for bit",
    r"\bon (one|a) screen\b": "its number of lines",
    r"\bits? deed\b|\bby the deed\b": "at the moment of",
}


def pieces(page: str) -> Iterator[str]:
    """The paragraphs and list items of a page, each on one line."""
    text = re.sub(r"^( *)```.*?^\1```$|<!--.*?-->", "", page, flags=re.S | re.M)
    lines = ["" if re.match(r"\s*(\||#|:::|!\[|options: )", line) else line for line in text.splitlines()]
    text = re.sub(r"^\s*([-*]|\d+\.) ", r"\n\n", "\n".join(lines), flags=re.M)
    yield from (" ".join(piece.split()) for piece in re.split(r"\n\s*\n", text) if piece.strip())


def sentences(page: str) -> Iterator[str]:
    """Sentences without markup: a link is its text, and a piece of code is `code`."""
    for piece in pieces(page):
        text = re.sub(r"!?\[((?:[^\]\[]|`[^`]*`)*)\]\([^)]*\)", r"\1", piece)
        plain = re.sub(r"``.+?``|`[^`]+`", "`code`", text)
        yield from filter(None, re.split(r"(?<=[.!?])[\"*_)]*\s+(?=[\"*_(]*[A-Z`0-9])", plain))


def words(sentence: str) -> list[str]:
    """What is between spaces and has a letter or a digit."""
    return [word for word in sentence.split() if re.search(r"\w", word)]


def slips(sentence: str) -> list[str]:
    """Words of our own in a sentence without markup, with what the field says."""
    return [
        f"{match.group()!r}, better: {better}: {sentence}"
        for pattern, better in PLAIN.items()
        if (match := re.search(pattern, sentence.replace("`code`", ""), re.I))
    ]


def test_sentences_are_found_without_code_tables_and_headings():
    page = "# A head\nOne `x.y. Z` and [two words](a.md).\n\n| a | b |\n\n```\nNo. Not this.\n```\n"
    page += "- **Item.** Second. And"
    assert list(sentences(page)) == ["One `code` and two words.", "**Item.", "Second.", "And"]
    assert len(words("One `code` and - two words.")) == 5


@pytest.mark.parametrize("page", sorted(PAGES.keys() - EXCEPTIONS))
def test_no_sentence_is_longer_than_a_reader_keeps_in_mind(page):
    long = [f"{len(words(s))} words: {s}" for s in sentences(PAGES[page]) if len(words(s)) > LONGEST]
    assert not long, "\n" + "\n".join(long)


@pytest.mark.parametrize("page", sorted(PAGES.keys() - EXCEPTIONS))
def test_the_words_are_the_field_s(page):
    found = [slip for sentence in sentences(PAGES[page]) for slip in slips(sentence)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("page", sorted(PAGES.keys() - EXCEPTIONS))
def test_proselint_finds_nothing(page):
    """No clichés, archaisms, doubled words, hedges, needless variants and so on; pieces of code differ."""
    CheckRegistry().register_many(__register__)
    number = itertools.count()
    text = re.sub("`code`", lambda _: f"code{next(number)}", "\n".join(sentences(PAGES[page])))
    found = [f"{r.check_result.check_path}: {r.check_result.message}" for r in LintFile(page, text).lint(LINT)]
    assert not found, "\n" + "\n".join(found)


def test_proselint_would_find_something():
    CheckRegistry().register_many(__register__)
    assert LintFile("x", "It is is a very unique idea, and back to the drawing board.").lint(LINT)


def test_the_exceptions_are_few_and_are_there():
    assert len(EXCEPTIONS) <= 10 and EXCEPTIONS <= PAGES.keys()
