"""Majority vote, pass@k, intervals, evaluation. Oracles: numbers worked out by hand, the enumeration of every possible
outcome, and simulation."""

import itertools
import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

import grpo
from grpo import Problem, half_interval, majority_vote, pass_at_k


@pytest.mark.parametrize("n, c, k, expected", [
    (10, 3, 1, 0.3), (10, 3, 5, 0.916667), (10, 3, 8, 1), (4, 2, 2, 0.833333), (16, 1, 16, 1), (64, 0, 64, 0),
    (64, 5, 10, 0.585218), (200, 10, 100, 0.999229), (8, 8, 3, 1)])
def test_pass_at_k(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-6)


def test_pass_at_k_counts_subsets():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            hits = [any(i < c for i in chosen) for chosen in itertools.combinations(range(n), k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("predictions, expected", [
    (["7", "7", "8", "9"], "7"), (["8", "7", "7", "8"], "8"), (["7", "8", "8", "7"], "7"), ([None, None, "7"], "7"),
    ([None, None], None), ([], None), (["1/2", "0.5", "3", "3"], "1/2"), (["3", "1/2", "0.5", "3", "2/4"], "1/2"),
    (["9", "7", None, "7.0", None, None], "7")])
def test_majority_vote(predictions, expected):
    assert majority_vote(predictions, lambda a, b: Fraction(a) == Fraction(b)) == expected
    assert majority_vote(predictions) == expected  # by default as the grader compares answers


@pytest.mark.parametrize("shares, expected", [
    ((0.4, 0.3, 0.3), {1: 0.4, 3: 0.424, 5: 0.447040, 9: 0.488650, 17: 0.546546, 33: 0.629143}),
    ((0.4, 0.6), {1: 0.4, 3: 0.352, 5: 0.317440, 9: 0.266568, 17: 0.198936, 33: 0.121099}),
    ((0.6, 0.4), {1: 0.6, 3: 0.648, 5: 0.682560, 9: 0.733432, 17: 0.801064, 33: 0.878901})])
def test_expected_accuracy_of_the_vote(shares, expected):
    """Over all counts in which k samples can come out; of those that tie each comes first equally often."""
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
                vote = majority_vote([first] * counts[first] + others, int.__eq__)  # the first answer is right
                total += chance / len(leaders) * (vote == 0)
        assert total == pytest.approx(accuracy, abs=1e-6)


# --- intervals


def coverage(draws, values):
    """How often an interval from 100 problems x 8 samples holds the true accuracy, over simulated models."""
    draw = torch.Generator().manual_seed(0)
    chances = torch.rand(draws, 100, generator=draw) ** 2  # many hard problems, some easy ones: 1/3 on average
    right = (torch.rand(draws, 100, 8, generator=draw) < chances[..., None]).float()
    shares = [values(samples) for samples in right]
    return sum(abs(sum(share) / len(share) - 1 / 3) <= half_interval(share) for share in shares) / draws


def test_the_interval_holds_the_truth_as_often_as_it_says():
    assert 0.93 < coverage(2000, lambda samples: samples.mean(1).tolist()) < 0.97
    # Samples of one problem are no independent evidence: as if each were a problem, it promises too much.
    assert coverage(300, lambda samples: samples.flatten().tolist()) < 0.8


@pytest.mark.parametrize("values, expected", [
    ([0.0, 1.0, 0.0, 1.0], 1.96 * 12**-0.5), ([0.25, 0.75, 0.5, 0.5], 1.96 * 96**-0.5),  # s² = 1/3, 1/24
    ([1.0] * 100, 0.03), ([0.0] * 10, 0.3), ([0.4], 3.0)])  # all right or all wrong: the rule of three, 3 / n
def test_the_interval_by_hand(values, expected):
    assert half_interval(values) == pytest.approx(expected)


# --- evaluation, on given completions

THOUGHT = "<think> {} </think> <answer> {} </answer>"


@pytest.fixture
def given(monkeypatch):
    """A function: from now on these texts are what any model samples -> what it was asked for."""

    def give(texts, tokens=None, truncated=None):
        asked = []

        def sample_completions(model, tokenizer, prompts, *, group_size, temperature, top_p, **_):
            asked.append((prompts, group_size, temperature, top_p))
            return SimpleNamespace(texts=texts, completion_tokens=torch.tensor(tokens or [1] * len(texts)),
                                   truncated=torch.tensor(truncated or [False] * len(texts)))

        monkeypatch.setattr(grpo, "sample_completions", sample_completions)
        return asked

    return give


def settings(**changes):
    return grpo.make_config("x", template="Q {question} A", eval_samples=4, **changes)


def test_an_evaluation_by_hand(given):
    rows = [(THOUGHT.format("wait, check", "7"), 10, "right"),
            ("it is 7", 2, "no_answer"),  # right only leniently: no tags
            (THOUGHT.format("我 we", "8"), 8, "wrong"),  # half in English
            (THOUGHT.format("seven", "7.0"), 6, "right"),
            (THOUGHT.format("但 我", "0.5"), 8, "right"),  # nothing in English; 但 is but
            (THOUGHT.format("two", "2"), 4, "wrong"), (THOUGHT.format("two", "2"), 4, "wrong"),
            ("<think> one", 20, "no_answer")]
    texts, tokens, outcomes = zip(*rows)
    asked, samples = given(texts, tokens, [False] * 7 + [True]), []
    result = grpo.evaluate(None, None, [Problem("3 + 4?", "7"), Problem("1 / 2?", "1/2")],
                           settings(eval_temperature=0.5), samples)
    assert asked == [(["Q 3 + 4? A", "Q 1 / 2? A"], 4, 0.5, 0.95)]
    assert result == dict(
        pass_at_1=pytest.approx(3 / 8), interval=half_interval([0.5, 0.25]),
        pass_at_2=pytest.approx((5 / 6 + 1 / 2) / 2), pass_at_4=1.0,  # 2 and 1 of 4 are right
        maj_at_k=0.5,  # 7 = 7.0 against 8; 2 and 2 against 0.5
        k=4, problems=2, lenient_accuracy=0.5, format_rate=pytest.approx(6 / 8),
        language=pytest.approx((1 + 1 + 0.5 + 1 + 0 + 1 + 1 + 1) / 8), truncated_rate=pytest.approx(1 / 8),
        mean_tokens=pytest.approx(62 / 8), reflection_rate=pytest.approx(2 / 8))
    assert [(row["completion"], row["outcome"]) for row in samples] == list(zip(texts, outcomes))
    assert [(row["question"], row["answer"]) for row in samples] == [("3 + 4?", "7")] * 4 + [("1 / 2?", "1/2")] * 4


def test_a_vote_on_expressions_is_one_for_the_same_expression(given):
    """2+3 and 3+2 make the same number; each has votes of its own, however it is spaced."""
    problem = Problem("make 5", "5", "countdown", (2, 3))
    for expressions, right, vote in ((["2 + 3", "9 - 4", "3 + 2", "9 - 4"], 0.5, 0.0),
                                     (["9 - 4", "2 + 3", "2+3", "3 + 2"], 0.75, 1.0)):
        given([THOUGHT.format("x", text) for text in expressions])
        result = grpo.evaluate(None, None, [problem], settings())
        assert (result["pass_at_1"], result["maj_at_k"]) == (right, vote)


def test_every_program_runs_once(given, monkeypatch):
    programs = ["x = 3", "x = 4", "x  = 4", "no program"]
    given([f"```python\n{text}\n```" if "=" in text else text for text in programs])
    ran = []
    monkeypatch.setattr(grpo, "run_tests",
                        lambda program, tests: ran.append(program) or ("wrong" if "3" in program else "right"))
    result = grpo.evaluate(None, None, [Problem("four?", task="code", tests=("assert x == 4",))], settings())
    assert [program.strip() for program in ran] == programs[:3]
    assert (result["pass_at_1"], result["maj_at_k"], result["lenient_accuracy"]) == (0.5, 1.0, 0.5)


PAIRS = [Problem("hello", task="helpful", completion="<think> b </think> hello !", rejected="no"),
         Problem("help bad", task="harmless", completion="<think> b </think> sorry !", rejected="good")]


def test_good_replies_are_as_good_as_themselves(given):
    given([pair.completion for pair in PAIRS for _ in range(4)])
    result = grpo.evaluate_general(None, None, PAIRS, settings(), lambda rows: [float(len(text)) for text, _ in rows])
    assert result == dict(judge=0.5, helpful=1.0, harmless=1.0)


def test_replies_by_hand(given):
    """σ(score of ours - score of the good reply), a mean over replies; each is scored beside its question."""
    texts = ["<think> a </think>  hello!", "a", "b", "c",  # of a helpful reply only the final part counts
             "<think> a </think> sorry !", "<think> b </think> sorry !", "d", "<think> b </think> sorry no !"]
    asked = given(texts)
    scores = dict(zip(texts, (1.0, 0.0, -2.0, 5.0, 1.0, 2.0, 3.0, 4.0))) | {PAIRS[0].completion: 1.0}

    def judge(rows):
        replies, questions = zip(*rows)
        assert list(questions) == (PAIRS if len(rows) == 2 else [PAIRS[0]] * 4 + [PAIRS[1]] * 4)
        return [scores[text] for text in replies]

    result, sigma = grpo.evaluate_general(None, None, PAIRS, settings(), judge), lambda x: 1 / (1 + math.exp(-x))
    expected = sum(map(sigma, (0, -1, -3, 4, -1, 0, 1, 2))) / 8
    assert result == dict(judge=pytest.approx(expected, abs=1e-6), helpful=0.25, harmless=0.25)
    assert asked == [(["Q hello A", "Q help bad A"], 4, 0.6, 0.95)]
