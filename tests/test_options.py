"""How a line of options is read."""

import pytest

from fedlora.cli import _parser
from fedlora.options import parsed


@pytest.mark.parametrize(
    "line, texts, own_code",
    [
        (["RUN", "a", "b"], ["a", "b"], False),
        (["RUN", "--own-code", "a", "b"], ["a", "b"], True),
        (["RUN", "a", "--own-code", "b"], ["a", "b"], True),
        (["--own-code", "RUN", "a"], ["a"], True),
        (["RUN", "--own-code"], [], True),
    ],
)
def test_texts_stand_before_or_after_options(line, texts, own_code):
    told = parsed(_parser(), ["predict", *line])
    assert (told.run, told.texts, told.own_code) == ("RUN", texts, own_code)


@pytest.mark.parametrize(
    "line, told",
    [
        (["predict", "RUN", "a", "--bad", "b"], "--bad b"),
        (["check", "smoke", "more"], "more"),
        (["simulate", "smoke", "--res"], "--res"),
    ],
)
def test_what_no_command_takes_is_refused(line, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        parsed(_parser(), line)
    assert f"unrecognized arguments: {told}" in capsys.readouterr().err
