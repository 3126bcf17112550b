"""Every architecture does what the table of docs/models.md says, and what it does is right."""

import pytest

from tests.zoo import matrix

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),  # peft, of GPT-2's layers
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings"),  # and of factors on a tied output
]


@pytest.mark.parametrize("at, name", list(enumerate(matrix.NAMES)), ids=matrix.NAMES)
def test_an_architecture_does_what_the_page_says(at, name, tmp_path):
    """Else `python -m tests.zoo.matrix` writes the page anew."""
    assert matrix.look(name, tmp_path) == matrix.shown()[at]


def test_the_page_has_no_other_rows():
    assert len(matrix.shown()) == len(matrix.NAMES)
