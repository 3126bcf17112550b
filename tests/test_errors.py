import pickle

import pytest

from fedlora import errors
from fedlora.errors import ScenarioError, SettingError, UserError, suggestion


@pytest.mark.parametrize(
    ("child", "parent"),
    [
        ("UserError", "FedloraError"),
        ("ScenarioError", "UserError"),
        ("SettingError", "UserError"),
        ("RoundError", "FedloraError"),
        ("ContractError", "FedloraError"),
        ("Refusal", "FedloraError"),
        ("FedloraError", "Exception"),
    ],
)
def test_the_tree_is_as_drawn_in_the_module(child, parent):
    assert getattr(errors, child).__bases__[0].__name__ == parent
    assert child in str(errors.__doc__)


def test_a_user_error_is_a_line_for_each_problem():
    error = ScenarioError("a.yaml:1: first", "a.yaml:2: second")
    assert error.lines == ("a.yaml:1: first", "a.yaml:2: second")
    assert str(error) == "a.yaml:1: first\na.yaml:2: second"


def test_a_setting_error_names_its_key_and_survives_a_process_boundary():
    error = SettingError("data.files.text", "no such column")
    again = pickle.loads(pickle.dumps(error))
    for one in (error, again):
        assert (one.key, one.message) == ("data.files.text", "no such column")
        assert str(one) == "data.files.text: no such column" and one.lines == (str(one),)
        assert isinstance(one, UserError)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("tweet", "did you mean 'tweets'?"),
        ("sst", "did you mean 'sst2'?"),
        ("imagenet", "known: ag_news, sst2, tweets"),
        ("", "known: ag_news, sst2, tweets"),
    ],
)
def test_suggestion_names_the_nearest_else_all_in_order(word, expected):
    assert suggestion(word, ["tweets", "sst2", "ag_news"]) == expected


def test_a_count_agrees_with_its_noun():
    assert [errors.counted(n, "client") for n in (0, 1, 2, 1000)] == [
        "0 clients",
        "1 client",
        "2 clients",
        "1,000 clients",
    ]


def test_where_nothing_is_known_that_is_said():
    assert suggestion("nosuch", []) == "there is none"
