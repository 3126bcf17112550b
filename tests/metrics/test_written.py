import pytest

from fedlora.metrics.written import rouge_l


@pytest.mark.parametrize(
    "said, given, figure",
    [
        ("police kill the gunman", "police killed the gunman", 2 * 3 / 8),  # as in Lin (2004): 3 of 4 and of 4
        ("the gunman kill police", "police killed the gunman", 2 * 2 / 8),
        ("a b c d e", "A, c? e!", 2 * 3 / 8),
        ("b a", "a b", 2 * 1 / 4),
        ("a a a", "a", 2 * 1 / 4),
        ("no", "yes", 0.0),
        ("", "yes", 0.0),
        (" ", "...", 0.0),
        ("42", "42.", 1.0),
    ],
)
def test_rouge_l_is_f1_of_the_longest_common_subsequence(said, given, figure):
    assert rouge_l(said, given) == rouge_l(given, said) == pytest.approx(figure)
