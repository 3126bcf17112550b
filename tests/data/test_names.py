"""Labels that are likely meant as one."""

import pytest

from fedlora.data.names import alike, bare


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("caf\u00e9", "cafe\u0301"), "blanks, case or hidden signs"),
        (("good", "go\u200bod"), "blanks, case or hidden signs"),
        (("good", "good\ufeff"), "blanks, case or hidden signs"),
        (("good", "g\u00adood"), "blanks, case or hidden signs"),
        (("\u2764", "\u2764\ufe0f"), "blanks, case or hidden signs"),
        (("good", " Good"), "blanks, case or hidden signs"),
        (("1", "01"), "how a number is written"),
        (("1", "1.0", "2"), "how a number is written"),
        (("-0.50", "-.5", "-0.5"), "how a number is written"),
    ],
)
def test_they_are_told_in_a_line_that_shows_the_difference(names, what):
    (line,) = alike(names)
    assert f"differ by {what} alone" in line and "\u200b" not in line and "\u0301" not in line


@pytest.mark.parametrize(
    "names", [("1", "2"), ("a1", "a01"), ("e", "\u00e9"), ("1", "one"), ("", "x"), ("inf", "nan")]
)
def test_others_are_not(names):
    assert [*alike(names)] == []


def test_a_bare_name_keeps_what_is_seen():
    assert bare("\ufeff Caf\u0065\u0301  X") == "caf\u00e9 x"
