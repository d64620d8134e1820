"""Majority vote and pass@k. Oracles: numbers worked out by hand, and the enumeration of every possible outcome."""

import itertools
from fractions import Fraction

import pytest

from grpo import majority_vote, pass_at_k


def equal(a, b):
    return Fraction(a) == Fraction(b)


@pytest.mark.parametrize(
    "n, c, k, expected",
    [
        (10, 3, 1, 0.3),
        (10, 3, 5, 0.916667),
        (10, 3, 8, 1),
        (4, 2, 2, 0.833333),
        (16, 1, 16, 1),
        (64, 0, 64, 0),
        (64, 5, 10, 0.585218),
        (200, 10, 100, 0.999229),
        (8, 8, 3, 1),
    ],
)
def test_pass_at_k(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-6)


def test_pass_at_one_is_the_share_of_right_samples():
    assert all(pass_at_k(n, c, 1) == pytest.approx(c / n) for n in range(1, 20) for c in range(n + 1))


def test_pass_at_k_counts_subsets():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            hits = [any(i < c for i in chosen) for chosen in itertools.combinations(range(n), k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize(
    "predictions, expected",
    [
        (["7", "7", "8", "9"], "7"),
        (["8", "7", "7", "8"], "8"),
        (["7", "8", "8", "7"], "7"),
        ([None, None, "7"], "7"),
        ([None, None], None),
        ([], None),
        (["1/2", "0.5", "3", "3"], "1/2"),
        (["3", "1/2", "0.5", "3", "2/4"], "1/2"),
        (["9", "7", None, "7.0", None, None], "7"),
    ],
)
def test_majority_vote(predictions, expected):
    assert majority_vote(predictions, equal) == expected


@pytest.mark.parametrize(
    "shares, expected",
    [
        ((0.4, 0.3, 0.3), {1: 0.4, 3: 0.424, 5: 0.447040, 9: 0.488650}),
        ((0.4, 0.6), {1: 0.4, 3: 0.352, 5: 0.317440, 9: 0.266568}),
        ((0.6, 0.4), {1: 0.6, 3: 0.648, 5: 0.682560, 9: 0.733432}),
    ],
)
def test_expected_accuracy_of_the_vote(shares, expected):
    """Over all ways in which k samples can come out; the first answer is right."""
    for k, accuracy in expected.items():
        if len(shares) ** k > 2000:
            continue
        total = 0.0
        for outcome in itertools.product(range(len(shares)), repeat=k):
            chance = 1.0
            for answer in outcome:
                chance *= shares[answer]
            total += chance * (majority_vote(list(outcome), equal) == 0)
        assert total == pytest.approx(accuracy, abs=1e-6)
