"""Figures of what a model writes, beside what it should have written."""

import re
from itertools import pairwise

WRITTEN = ("exact_match", "rouge_l")
"""Their names where a scenario asks for answers; more is better."""

_WORD = re.compile(r"\w+")


def rouge_l(said: str, given: str) -> float:
    """ROUGE-L as F1 (Lin, 2004, https://aclanthology.org/W04-1013), in [0, 1].

    With L the length of the longest common subsequence of the m words of one text and the n of the other, it is
    the harmonic mean of L / m and L / n: 2 L / (m + n). Words are letters and digits, in lower case.
    """
    one, other = _WORD.findall(said.lower()), _WORD.findall(given.lower())
    row = [0] * (len(other) + 1)  # the longest of the words so far and of each beginning of the other text
    for word in one:
        best = [0]
        for (corner, above), there in zip(pairwise(row), other, strict=True):
            best.append(corner + 1 if word == there else max(above, best[-1]))
        row = best
    return 2 * row[-1] / (len(one) + len(other)) if one or other else 0.0
