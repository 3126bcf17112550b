"""What is read from disk or from a client ends well or in an error of ours; `fuzz` does more of it."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults import fuzz


@pytest.mark.parametrize("what", sorted(fuzz.READERS))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 2**40))
def test_damaged_input_is_an_error_of_ours(what, number, tmp_path):
    fuzz.feed(what, number, tmp_path)


def test_damage_is_found_and_some_of_it_is_harmless(tmp_path):
    for what in fuzz.READERS:
        taken = sum(fuzz.feed(what, number, tmp_path) for number in range(60))
        assert taken < 60, f"all damage to a {what} went unnoticed"
