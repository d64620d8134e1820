"""Majority vote, pass@k, intervals, evaluation. Oracles: numbers worked out by hand, the enumeration of every possible
outcome, and simulation."""

import itertools
import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

import grpo
from grpo import Problem, confidence_interval, majority_vote, pass_at_k


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


@pytest.mark.parametrize(
    "shares, expected",
    [
        ((0.4, 0.3, 0.3), {9: 0.488650, 17: 0.546546, 33: 0.629143}),
        ((0.4, 0.6), {17: 0.198936, 33: 0.121099}),
        ((0.6, 0.4), {17: 0.801064, 33: 0.878901}),
    ],
)
def test_expected_accuracy_of_a_vote_of_many(shares, expected):
    """Over all counts in which k samples can come out; each of those that tie comes first equally often."""
    for k, accuracy in expected.items():
        total = 0.0
        for counts in itertools.product(range(k + 1), repeat=len(shares)):
            if sum(counts) != k:
                continue
            chance = math.factorial(k)
            for share, count in zip(shares, counts):
                chance *= share**count / math.factorial(count)
            leaders = [answer for answer, count in enumerate(counts) if count == max(counts)]
            for first in leaders:
                others = [a for a, count in enumerate(counts) for _ in range(count) if a != first]
                vote = majority_vote([first] * counts[first] + others, int.__eq__)
                total += chance / len(leaders) * (vote == 0)
        assert total == pytest.approx(accuracy, abs=1e-6)


# --- intervals


def coverage(draws, interval):
    """How often an interval from 100 problems x 8 samples holds the true accuracy, over simulated models."""
    draw = torch.Generator().manual_seed(0)
    chances = (
        torch.rand(draws, 100, generator=draw) ** 2
    )  # many hard problems, some easy ones: 1/3 on average
    right = (torch.rand(draws, 100, 8, generator=draw) < chances[..., None]).float()
    hits = 0
    for samples in right:
        low, high = interval(samples)
        hits += low <= 1 / 3 <= high
    return hits / draws


def test_the_interval_holds_the_truth_as_often_as_it_says():
    by_problem = lambda samples: confidence_interval(samples.mean(1).tolist())
    assert 0.93 < coverage(2000, by_problem) < 0.97


def test_samples_of_one_problem_are_no_independent_evidence():
    """An interval from all 800 samples, as if each were a problem, promises too much."""
    by_sample = lambda samples: confidence_interval(samples.flatten().tolist())
    assert coverage(300, by_sample) < 0.8


def test_the_interval_by_hand():
    assert confidence_interval([0.0, 1.0, 0.0, 1.0]) == [0.0, 1.0]  # 0.5 ± 0.566, cut off
    low, high = confidence_interval([0.25, 0.75, 0.5, 0.5])  # s² = 1/24
    assert (low, high) == (pytest.approx(0.5 - 1.96 * 96**-0.5), pytest.approx(0.5 + 1.96 * 96**-0.5))
    assert confidence_interval([1.0] * 100) == [0.97, 1.0]  # all alike: the rule of three, 3 / n
    assert confidence_interval([0.5, 0.5]) == confidence_interval([0.5]) == [0.0, 1.0]


# --- evaluation, on given completions

THOUGHT = "<think> {} </think> <answer> {} </answer>"


@pytest.fixture
def given(monkeypatch):
    """A function: from now on these texts are what any model samples -> what it was asked for."""

    def give(texts, tokens=None, truncated=None):
        asked = []

        def sample_for(model, tokenizer, problems, cfg, group_size, seed, temperature=None, top_p=1.0):
            asked.append((problems, group_size, temperature, top_p))
            return SimpleNamespace(
                texts=texts,
                completion_tokens=torch.tensor(tokens or [1] * len(texts)),
                truncated=torch.tensor(truncated or [False] * len(texts)),
            )

        monkeypatch.setattr(grpo, "sample_for", sample_for)
        return asked

    return give


def test_an_evaluation_by_hand(given):
    problems = [Problem("3 + 4?", "7"), Problem("1 / 2?", "1/2")]
    asked = given(
        [
            THOUGHT.format("wait, check", "7"),  # right, in English, two reflections
            "it is 7",  # right only leniently: no tags
            THOUGHT.format("我 we", "8"),  # wrong, half in English
            THOUGHT.format("seven", "7.0"),
            THOUGHT.format("但 我", "0.5"),  # right, one reflection, nothing in English
            THOUGHT.format("two", "2"),
            THOUGHT.format("two", "2"),
            "<think> one",
        ],
        tokens=[10, 2, 8, 6, 8, 4, 4, 20],
        truncated=[False] * 7 + [True],
    )
    cfg = grpo.make_config("x", eval_samples=4, eval_temperature=0.5, eval_top_p=0.9)
    result = grpo.evaluate(None, None, problems, cfg)
    assert asked == [(problems, 4, 0.5, 0.9)]
    assert result == dict(
        pass_at_1=pytest.approx(3 / 8),
        pass_at_1_ci95=confidence_interval([0.5, 0.25]),
        maj_at_k=0.5,  # 7 = 7.0 against 8; 2 and 2 against 0.5
        pass_at_k=1.0,
        k=4,
        problems=2,
        lenient_accuracy=0.5,
        format_rate=pytest.approx(6 / 8),
        language=pytest.approx((1 + 1 + 0.5 + 1 + 0 + 1 + 1 + 1) / 8),
        truncated_rate=pytest.approx(1 / 8),
        mean_tokens=pytest.approx(62 / 8),
        tokens_right=pytest.approx(24 / 3),
        tokens_wrong=pytest.approx(38 / 5),
        reflection_rate=pytest.approx(2 / 8),
        reflections=pytest.approx(3 / 8),
    )
    chinese = grpo.evaluate(None, None, problems, grpo.dataclasses.replace(cfg, language="zh"))
    assert chinese["language"] == pytest.approx((0 + 0 + 0.5 + 0 + 1 + 0 + 0 + 0) / 8)


def test_a_vote_on_expressions_is_one_for_the_same_expression(given):
    """2+3 and 3+2 make the same number; each has one vote, 9-4 two."""
    problem = Problem("make 5", "5", "countdown", (2, 3))
    given([THOUGHT.format("x", text) for text in ("2 + 3", "9 - 4", "3 + 2", "9 - 4")])
    result = grpo.evaluate(None, None, [problem], grpo.make_config("x", eval_samples=4))
    assert (result["pass_at_1"], result["maj_at_k"]) == (0.5, 0.0)


PAIRS = [
    Problem("hello", task="helpful", completion="hello !", rejected="no"),
    Problem("help bad", task="harmless", completion="sorry no !", rejected="good"),
]


def test_a_win_rate_is_one_half_against_itself(given):
    given([pair.completion for pair in PAIRS for _ in range(3)])
    judge = lambda texts, problems: [float(len(text)) for text in texts]
    assert grpo.win_rate(None, None, PAIRS, grpo.make_config("x", eval_samples=3), judge) == 0.5


def test_a_win_rate_by_hand(given):
    """σ(score of ours - score of the good reply), a mean over replies; each is scored beside its question."""
    asked = given(["a", "b", "c", "d"])
    scores = {"a": 1.0, "b": 0.0, "c": -2.0, "d": 5.0, "hello !": 1.0, "sorry no !": -2.0}

    def judge(texts, problems):
        expected = PAIRS if len(texts) == 2 else [PAIRS[0]] * 2 + [PAIRS[1]] * 2
        assert list(problems) == expected
        return [scores[text] for text in texts]

    cfg = grpo.make_config("x", eval_samples=2)
    sigma = lambda difference: 1 / (1 + math.exp(-difference))
    expected = (sigma(0) + sigma(-1) + sigma(0) + sigma(7)) / 4
    assert grpo.win_rate(None, None, PAIRS, cfg, judge) == pytest.approx(expected, abs=1e-6)
    assert asked == [(PAIRS, 2, cfg.eval_temperature, cfg.eval_top_p)]
