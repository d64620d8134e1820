"""Stages: what is learned from and by whom it is judged, and the command line of every stage, at toy size.

The embedded base models of these tests are untrained: what counts is the way that files, settings and models go from
one stage to the next. The oracle of a pipeline that was killed is the one that nobody disturbed.
"""

import ast
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import grpo
from grpo import EMBEDDED, Problem, RunError, make_config, read_problems, write_problems

GOOD = "<think> 1 + 1 is 2 </think> <answer> 2 </answer>"
SUM = Problem("1 + 1?", "2")


# --- files of problems

KINDS = [
    Problem("What is 3 + 4?", "7"),
    Problem("1, 2, 3 for 6", "6", "countdown", (1, 2, 3)),
    Problem("Add two", task="code", tests=("assert add(1, 2) == 3", {"input": "1 2", "output": "3"})),
    Problem("hello", task="helpful", completion="<think> hi </think> hello\nyou", rejected="no"),
    Problem("help bad", task="harmless", completion="sorry"),
    Problem("who?", task="helpful"),
    Problem("2 + 2", "4", completion='四 \u2028 <think>é\t"4"</think> \\boxed{4}'),
    Problem("An example without a reference", completion="text"),
]


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "problems.jsonl"
    write_problems(path, KINDS)
    assert read_problems(path) == KINDS
    assert [p.name for p in tmp_path.iterdir()] == ["problems.jsonl"]  # no temporary file stays
    assert all("" not in json.loads(line).values() for line in path.read_text("utf-8").split("\n") if line)
    write_problems(path, grpo.calculator_problems()[:50] + grpo.general_problems())
    assert read_problems(path) == grpo.calculator_problems()[:50] + grpo.general_problems()


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "problems.jsonl"
    write_problems(path, KINDS)
    monkeypatch.setattr(grpo.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_problems(path, KINDS[:1])
    assert read_problems(path) == KINDS


@pytest.mark.parametrize(
    "row, message",
    [
        ({"completion": 3}, "field completion must be text, and not empty where there is a rejected one"),
        (
            {"task": "helpful", "completion": "", "rejected": "no"},
            "field completion must be text, and not empty",
        ),
        ({"completion": "a", "rejected": ["b"]}, "field rejected must be text"),
        ({"task": "math"}, "field answer must be text or a number"),
        ({"task": "something", "completion": ""}, "field answer must be text or a number"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1", "answer": 1}\n' + json.dumps({"question": "q", **row}) + "\n")
    with pytest.raises(grpo.InputError, match=f"rows.jsonl line 2: {message}"):
        read_problems(path)


def test_the_embedded_worlds_small_talk():
    """Pairs whose good reply is polite, well-formed and better than the bad one; examples, half of them bad."""
    problems = grpo.general_problems()
    assert problems == grpo.general_problems() and {p.task for p in problems} == {"helpful", "harmless"}
    pairs = [p for p in problems if p.rejected]
    examples = [p for p in problems if not p.rejected]
    assert len(pairs) == len(examples) == len({p.question for p in problems}) > 400
    good = {p.question: p.completion for p in pairs}
    assert all(grpo.format_reward(p.completion, p) == 1 and p.completion != p.rejected for p in pairs)
    assert all(p.question.split()[-1] in p.completion or p.question.count("am") for p in pairs)
    share = sum(p.completion == good[p.question] for p in examples) / len(examples)
    assert 0.4 < share < 0.6
    assert {p.completion for p in examples} <= {*good.values(), *(p.rejected for p in pairs)}
    for p in problems:  # every word is in the vocabulary: none becomes <unk>
        for text in (p.question, p.completion, p.rejected):
            assert all(part in grpo.TOKEN_ID for part in text.replace("+", " + ").replace("=", " = ").split())


# --- the score


class Judge:
    """Scores by length; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, texts, problems):
        self.asked += zip(texts, problems)
        return [float(len(text)) for text in texts]


HELLO, BAD = Problem("hello", task="helpful"), Problem("help bad", task="harmless")


@pytest.mark.parametrize("language_weight", (0.0, 0.5))
def test_rules_judge_reasoning_and_the_reward_model_the_rest(language_weight):
    judge, cfg = (
        Judge(),
        make_config(
            "x",
            accuracy_weight=2.0,
            format_weight=3.0,
            preference_weight=0.1,
            language_weight=language_weight,
        ),
    )
    texts = [GOOD, "2", "<think> 我 hi </think> hello", "hello", "<think> no </think> no", ""]
    rollout = SimpleNamespace(texts=texts)
    rewards, parts, outcomes = grpo.score(rollout, [SUM, HELLO, BAD], cfg, judge)
    lengths = [len(text) for text in texts]
    assert parts["accuracy"] == [1.0, 0.0, None, None, None, None]
    assert parts["format"] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert parts["preference"] == [None, None, *lengths[2:]]
    assert judge.asked == [(text, problem) for text, problem in zip(texts[2:], [HELLO, HELLO, BAD, BAD])]
    language = [1.0, 1.0, 0.5, 1.0, 1.0, 1.0]
    assert parts.get("language") == (language if language_weight else None)
    expected = [5.0, 0.0, 3 + 0.1 * lengths[2], 0.1 * lengths[3], 3 + 0.1 * lengths[4], 0.1 * lengths[5]]
    expected = [r + language_weight * value for r, value in zip(expected, language)]
    torch.testing.assert_close(rewards, torch.tensor(expected).view(3, 2))
    assert outcomes == Counter(right=1, no_answer=1, unjudged=4)


def test_reasoning_alone_needs_no_reward_model():
    rewards, parts, _ = grpo.score(SimpleNamespace(texts=[GOOD, "2"]), [SUM], make_config("x"), None)
    assert rewards.tolist() == [[2.0, 0.0]] and "preference" not in parts


def small_run(**overrides):
    settings = dict(prompts_per_step=4, group_size=2, max_completion_tokens=4, steps=3, kl_coef=0.0)
    return make_config("x", gradient_checkpointing=False, **{**settings, **overrides})


def test_what_does_not_apply_has_no_part_in_a_mean(make_model, tokenizer, monkeypatch):
    assert grpo.mean([1.0, None, 0.0, None]) == 0.5 and grpo.mean([None]) == 0.0
    rule = lambda text, problem, lenient=False: "unjudged" if problem.task in grpo.GENERAL else "right"
    monkeypatch.setattr(grpo, "grade", rule)
    steps, cfg = [], small_run(prompts_per_step=2, steps=1)
    judge = lambda texts, problems: [3.0] * len(texts)
    after = lambda metrics, *_: steps.append(metrics)
    grpo.train_grpo(make_model(), tokenizer, [SUM, HELLO], cfg, after, reward_model=judge)
    assert [(m["accuracy"], m["preference"]) for m in steps] == [(1.0, 3.0)]
    assert steps[0]["outcomes"] == {"right": 2, "unjudged": 2}


def test_problems_may_be_a_function_of_the_step(make_model, tokenizer):
    pools = {1: [Problem("1", "1")] * 3, 2: [Problem(str(n), "2") for n in range(5)], 3: [Problem("3", "3")]}
    cfg, batches = small_run(), []
    grpo.train_grpo(
        make_model(), tokenizer, pools.__getitem__, cfg, lambda m, rollout, batch, _: batches.append(batch)
    )
    assert batches == [grpo.batch_of_problems(pools[step], step, cfg) for step in (1, 2, 3)]


# --- rejection sampling


@pytest.mark.parametrize(
    "completion, truncated, problem, reason",
    [
        (GOOD, False, SUM, ""),
        (GOOD, True, SUM, "truncated"),
        (GOOD.replace("> 2", "> 3"), False, SUM, "not right"),
        ("<answer> 2 </answer>", False, SUM, "unreadable"),
        (GOOD.replace("is", "等 is"), False, SUM, "mixed language"),
        # the first that holds is named
        ("<answer> 3 </answer>", True, SUM, "truncated"),
        ("等 <answer> 3 </answer>", False, SUM, "not right"),
        (
            "<think> 等 <answer> 2 </answer> </think> <think> </think> <answer> 2 </answer>",
            False,
            SUM,
            "unreadable",
        ),
    ],
)
def test_a_fault_has_a_name(completion, truncated, problem, reason):
    assert grpo.fault(completion, truncated, problem, make_config("x")) == reason
    assert grpo.fault(completion, truncated, problem, make_config("x", filter_samples=False)) == ""


def test_the_language_of_examples_is_that_of_the_run():
    chinese = GOOD.replace("1 + 1 is 2", "我 们")
    assert grpo.fault(chinese, False, SUM, make_config("x", language="zh")) == ""
    assert grpo.fault(GOOD, False, SUM, make_config("x", language="zh")) == "mixed language"


WRONG, OTHER = GOOD.replace("> 2", "> 3"), GOOD.replace("is 2", "makes 2")
TEXTS = {  # what comes out for each question, and what of it is kept
    "a": [GOOD, GOOD, WRONG, OTHER],
    "b": [WRONG, WRONG, WRONG, WRONG],
    "c": [WRONG, OTHER, GOOD, OTHER],
    "d": [GOOD, GOOD, GOOD, GOOD],
    "e": [OTHER, GOOD.replace("is", "为"), GOOD, GOOD],
}


@pytest.fixture
def drawn(monkeypatch):
    """Completions as in TEXTS; the last one of "e" is truncated -> the batches asked for."""
    asked = []

    def sample_for(model, tokenizer, problems, cfg, group_size, seed, temperature=None, top_p=1.0):
        asked.append(([p.question for p in problems], group_size, seed, temperature, top_p))
        texts = [text for p in problems for text in TEXTS[p.question]]
        cut = [p.question == "e" and i == 3 for p in problems for i in range(4)]
        return SimpleNamespace(texts=texts, truncated=torch.tensor(cut))

    monkeypatch.setattr(grpo, "sample_for", sample_for)
    return asked


QUESTIONS = [Problem(name, "2") for name in TEXTS]


@pytest.mark.parametrize("keep, kept", [(1, "acde"), (2, "aaccdee"), (3, "aaccdee")])
def test_rejection_sampling_keeps_what_is_right_and_new(keep, kept, drawn):
    cfg = make_config("x", rejection_samples=4, keep_per_problem=keep, prompts_per_step=2)
    examples, fates = grpo.rejection_sample(None, None, QUESTIONS, cfg)
    assert "".join(e.question for e in examples) == kept
    assert len({(e.question, e.completion) for e in examples}) == len(examples) == fates["kept"]
    assert all(e.answer == "2" and grpo.accuracy_reward(e.completion, e) == 1 for e in examples)
    assert fates.total() == 20  # every completion has one fate
    first = {e.question: e.completion for e in reversed(examples)}
    assert first == {"a": GOOD, "c": OTHER, "d": GOOD, "e": OTHER}  # the first that is fit
    # a: duplicate, c: duplicate, d: three duplicates; e: one of two is truncated
    expected = Counter(
        {"kept": len(kept), "not right": 6, "duplicate": 5, "mixed language": 1, "truncated": 1}
    )
    expected["enough of its problem"] = 20 - expected.total()
    assert fates == +expected
    assert [names for names, *_ in drawn] == [["a", "b"], ["c", "d"], ["e"]]
    assert len({seed for _, _, seed, *_ in drawn}) == 3  # no two batches draw the same numbers
    assert {(k, temperature, p) for _, k, _, temperature, p in drawn} == {(4, None, 1.0)}  # as in training


def test_without_the_filter_wrong_ones_stay(drawn):
    cfg = make_config("x", rejection_samples=4, keep_per_problem=4, filter_samples=False)
    examples, fates = grpo.rejection_sample(None, None, QUESTIONS, cfg)
    assert [e.completion for e in examples if e.question == "b"] == [WRONG]
    assert len(examples) == fates["kept"] == 11 and fates == dict(kept=11, duplicate=9)


def test_a_model_is_sampled_and_learns_from_what_was_right(make_model, tokenizer):
    """From the first to the last: examples, a model that learned them, its own right completions, the same again."""
    cfg = make_config(
        "x",
        template="Q {question} A",
        max_completion_tokens=60,
        sft_epochs=40,
        sft_learning_rate=1e-2,
        sft_batch_size=2,
        rejection_samples=3,
        gradient_checkpointing=False,
        temperature=0.3,
    )
    problems = [Problem("3 + 4", "7"), Problem("4 + 4", "8"), Problem("5 + 4", "0")]
    taught = ["<think> 3 + 4 is 7 </think> <answer> 7 </answer>", GOOD.replace("2", "8")]
    model = make_model("qwen3")
    teach = [dataclasses.replace(p, completion=text) for p, text in zip(problems, taught)]
    grpo.train_sft(model, tokenizer, teach, cfg)
    examples, fates = grpo.rejection_sample(model, tokenizer, problems, cfg)
    assert examples == teach and fates["not right"] >= 3 and fates.total() == 9


# --- the command line of every stage


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Untrained embedded base models, by width."""
    root, folders = tmp_path_factory.mktemp("bases"), {}
    for name, width in EMBEDDED.items():
        torch.manual_seed(0)
        folders[width] = root / name
        folders[width].mkdir()
        grpo.new_tiny_model(width).save_pretrained(folders[width])
        grpo.build_tokenizer(folders[width]).save_pretrained(folders[width])
    return folders


def enter(folder, bases, patch):
    """Work in a folder with small files of data; the embedded base models are there at once -> arguments."""
    patch.chdir(folder)

    def build_base_model(path, seed=0, steps=2500, width=64):
        if not Path(path).exists():
            shutil.copytree(bases[width], path)
        return Path(path)

    patch.setattr(grpo, "build_base_model", build_base_model)
    problems = grpo.calculator_problems()
    rng = grpo.random.Random(0)
    traces = [(p, grpo.write_completion(rng, p, grpo.CAREFUL)) for p in problems[20:80]]
    short = [
        dataclasses.replace(p, completion=" ".join(trace[:-1])) for p, trace in traces if len(trace) < 32
    ]
    write_problems(Path("some.jsonl"), problems[:12])
    write_problems(Path("other.jsonl"), grpo.calculator_problems(evaluation=True)[:6])
    write_problems(Path("cold.jsonl"), short[:8])
    write_problems(Path("general.jsonl"), grpo.general_problems()[:60])
    options = (
        "--data some.jsonl --eval_data other.jsonl --prompts_per_step 4 --group_size 2 --steps 4 --eval_every 2 "
        "--max_completion_tokens 32 --eval_problems 3 --eval_samples 2 --rejection_samples 2 --sft_epochs 1 "
        "--sft_batch_size 4 --warmup_steps 0 --filter_samples False --save_every 2 --sample_every 0"
    )
    return options.split()


@pytest.fixture
def options(bases, tmp_path, monkeypatch):
    return enter(tmp_path, bases, monkeypatch)


def summary(path):
    return json.loads(Path(path, "summary.json").read_text())


def settings_of(path):
    return json.loads(Path(path, "config.json").read_text())


def test_supervised_training(options, capsys):
    assert grpo.main([*options, "--stage", "sft", "--data", "cold.jsonl", "--sft_epochs", "8"]) == 0
    facts = summary("runs/sft")
    assert facts["examples"] == 8 and facts["updates"] == 16 and facts["last_loss"] < facts["first_loss"] - 1
    assert facts["before"].keys() == facts["after"].keys() and facts["train_seconds"] > 0
    printed = capsys.readouterr().out
    assert "held-out problems" in printed and "wrote runs/sft/" in printed
    final = AutoModelForCausalLM.from_pretrained("runs/sft/final")
    assert final.config.embedded_world == 1 and grpo.is_tiny("runs/sft/final")
    assert not torch.equal(
        final.lm_head.weight, AutoModelForCausalLM.from_pretrained("runs/base-seed0").lm_head.weight
    )


def test_a_reward_model_and_a_run_that_it_judges(options, capsys):
    place = options.index("--eval_data")
    own = options[:place] + options[place + 2 :]  # of its own data a tenth is held out
    torch.manual_seed(0)  # of the reward model's head
    assert grpo.main([*own, "--stage", "reward", "--data", "general.jsonl", "--sft_epochs", "12"]) == 0
    facts = summary("runs/reward")
    assert facts["last_loss"] < 0.5 * facts["first_loss"] and facts["held_out_accuracy"] > 0.5
    assert facts["held_out_pairs"] == 3 and 24 <= facts["pairs"] <= 28  # of 30, a tenth is held out
    classifier = AutoModelForSequenceClassification.from_pretrained("runs/reward/final")
    assert classifier.config.num_labels == 1
    judged = "--general_data general.jsonl --reward_model runs/reward/final --preference_steps 2".split()
    assert grpo.main([*options, *judged, "--steps", "5"]) == 0
    rows = [json.loads(line) for line in Path("runs/zero/metrics.jsonl").read_text().splitlines()]
    assert ["preference" in row for row in rows][:3] == [False, False, False]
    assert sum(row["outcomes"].get("unjudged", 0) for row in rows[3:]) > 0  # half of the questions, by chance
    assert all(("preference" in row) == ("unjudged" in row["outcomes"]) for row in rows)
    assert all("unjudged" not in row["outcomes"] for row in rows[:3])
    assert 0 <= summary("runs/zero")["after"]["general"] <= 1
    assert "general" in capsys.readouterr().out


def test_general_questions_are_half_of_the_last_steps_only(options, monkeypatch):
    class Enough(RunError):
        """The pools of all steps are known."""

    def train_grpo(policy, tokenizer, problems, cfg, after_step, state, reward_model):
        nonlocal pools
        pools = [problems(step) for step in range(1, cfg.steps + 1)]
        assert reward_model is judge
        raise Enough

    pools, judge = [], Judge()
    judge.model = SimpleNamespace()
    monkeypatch.setattr(grpo, "RewardModel", lambda *_, **__: judge)
    monkeypatch.setattr(grpo, "train_grpo", train_grpo)
    judged = "--general_data general.jsonl --reward_model any --preference_steps 3 --steps 8".split()
    assert grpo.main([*options, *judged]) == 1
    shares = [sum(p.task in grpo.GENERAL for p in pool) / len(pool) for pool in pools]
    assert shares[:5] == [0] * 5 and len(shares) == 8
    assert all(0.3 < share < 0.7 for share in shares[5:])
    questions = [p.question for p in pools[-1] if p.task in grpo.GENERAL]
    assert max(Counter(questions).values()) == 1  # a question once, though it stands in several rows


def test_samples_are_data_again(options, capsys):
    assert grpo.main([*options, "--stage", "sample", "--model", "tiny", "--keep_per_problem", "2"]) == 0
    examples, facts = read_problems("runs/sample/examples.jsonl"), summary("runs/sample")
    assert facts["completions"] == 12 * 2 == sum(facts["fates"].values())
    assert facts["examples"] == len(examples) == facts["fates"]["kept"]
    problems = {p.question: p for p in read_problems("some.jsonl")}
    assert all(dataclasses.replace(e, completion="") == problems[e.question] for e in examples)
    assert grpo.main([*options, "--stage", "sft", "--data", "runs/sample/examples.jsonl"]) == 0
    assert summary("runs/sft")["examples"] == len(examples)
    assert "fates {" in capsys.readouterr().out


def test_a_model_without_a_right_completion_teaches_nothing(options, capsys):
    assert grpo.main([*options, "--stage", "sample", "--filter_samples", "True"]) == 1
    error = capsys.readouterr().err
    told = re.fullmatch(
        r"grpo.py: stopped: no completion of tiny is fit to learn from: (\{.*\}); take easier problems or .*\n",
        error,
    )
    assert sum(ast.literal_eval(told[1]).values()) == 24
    assert not Path("runs/sample/examples.jsonl").exists()
    assert not Path("runs/sample/summary.json").exists()


def test_evaluation_of_a_half_as_wide_model(options, capsys):
    assert grpo.main([*options, "--stage", "eval", "--model", "tinier"]) == 0
    facts = summary("runs/eval")
    assert facts["before"]["problems"] == 3 and facts["model"] == "tinier"
    assert AutoModelForCausalLM.from_pretrained("runs/tinier-seed0").config.hidden_size == 32
    assert not Path("runs/base-seed0").exists()
    assert "language" in facts["before"] and "59,000"[:2] in capsys.readouterr().out


def test_the_half_as_wide_model_is_of_the_embedded_world():
    assert grpo.is_tiny("tinier") and make_config("tinier").learning_rate == make_config("tiny").learning_rate
    assert grpo.base_folder("tiny", 3) == Path("runs/base-seed3") != grpo.base_folder("tinier", 3)
    size = lambda width: sum(p.numel() for p in grpo.new_tiny_model(width).parameters())
    assert 190_000 < size(64) < 194_000 and 58_000 < size(32) < 60_000


# --- R1

R1_FOLDERS = {  # stage of each folder, and the model that it starts from
    "0-reward-model": ("reward", "tiny"),
    "0-base": ("eval", "tiny"),
    "1-cold-start": ("sft", "tiny"),
    "2-reasoning-rl": ("zero", "runs/r1/1-cold-start/final"),
    "3-samples": ("sample", "runs/r1/2-reasoning-rl/final"),
    "3-sft": ("sft", "tiny"),
    "4-all-scenarios": ("zero", "runs/r1/3-sft/final"),
}
R1 = "--stage r1 --cold_start cold.jsonl --general_data general.jsonl --learning_rate 0.001".split()


@pytest.fixture(scope="session")
def finished(tmp_path_factory, bases):
    """A folder in which r1 ran from beginning to end."""
    root = tmp_path_factory.mktemp("r1")
    with pytest.MonkeyPatch.context() as patch:
        command = [*enter(root, bases, patch), *R1]
        torch.manual_seed(0)  # of the reward model's head
        assert grpo.main(command) == 0
    return root


@pytest.fixture
def again(finished, options, tmp_path):
    """The same files in a new folder, and the command."""
    shutil.rmtree(tmp_path)
    shutil.copytree(finished, tmp_path)
    os.chdir(tmp_path)
    return [*options, *R1]


def test_r1_has_the_papers_stages_and_starting_points(finished, monkeypatch):
    monkeypatch.chdir(finished)
    made = {
        p.name: (settings_of(p)["stage"], settings_of(p)["model"])
        for p in Path("runs/r1").iterdir()
        if p.is_dir()
    }
    assert made == R1_FOLDERS
    facts = {name: summary(f"runs/r1/{name}") for name in R1_FOLDERS}
    assert facts["3-sft"]["before"] == facts["0-base"]["before"] == facts["1-cold-start"]["before"]
    assert facts["2-reasoning-rl"]["before"] == facts["1-cold-start"]["after"] != facts["0-base"]["before"]
    assert facts["4-all-scenarios"]["before"] == facts["3-sft"]["after"] != facts["2-reasoning-rl"]["after"]
    rl, general = settings_of("runs/r1/2-reasoning-rl"), settings_of("runs/r1/4-all-scenarios")
    assert (rl["language_weight"], rl["preference_steps"], rl["temperature"]) == (1.0, 0, 1.0)
    assert (general["language_weight"], general["preference_steps"], general["temperature"]) == (1.0, 1, 0.7)
    judges = {
        settings_of(f"runs/r1/{name}")["reward_model"] for name in R1_FOLDERS if name != "0-reward-model"
    }
    assert judges == {"runs/r1/0-reward-model/final"}
    evaluated = {
        settings_of(f"runs/r1/{name}")["eval_data"] for name in R1_FOLDERS if name != "0-reward-model"
    }
    assert evaluated == {"runs/r1/held-out.jsonl"}
    assert read_problems("runs/r1/held-out.jsonl") == read_problems("other.jsonl")[:3]


def test_r1s_third_stage_mixes_reasoning_with_general_replies(finished, monkeypatch):
    monkeypatch.chdir(finished)
    rows = read_problems("runs/r1/mixed.jsonl")
    reasoning = [p for p in rows if p.task not in grpo.GENERAL]
    general = [p for p in rows if p.task in grpo.GENERAL]
    assert reasoning == read_problems("runs/r1/3-samples/examples.jsonl") and len(reasoning) == 12
    assert general == [p for p in grpo.load_problems("general.jsonl") if not p.rejected] and len(general) > 20
    assert summary("runs/r1/3-sft")["examples"] == len(rows)


def test_the_table_of_r1(finished):
    results, facts = summary(finished / "runs/r1")["results"], {}
    assert list(results) == list(R1_FOLDERS)
    for name, row in results.items():
        facts = summary(finished / "runs/r1" / name)
        assert row.keys() == {*grpo.RESULT_COLUMNS.values()} and row["seconds"] == facts["seconds"]
        if name in ("0-reward-model", "3-samples"):
            assert row["pass_at_1"] is None
        else:  # what came out, not what went in
            expected = facts.get("after", facts["before"])
            assert {key: row[key] for key in expected if key in row} == {
                key: value for key, value in expected.items() if key in row
            }
            assert 0 <= row["general"] <= 1


def test_a_finished_pipeline_repeats_nothing(again, monkeypatch, capsys):
    for name in ("train_sft", "train_grpo", "train_reward_model", "rejection_sample", "evaluate"):
        monkeypatch.setattr(grpo, name, None)
    before = {p: p.stat().st_mtime_ns for p in Path("runs/r1").rglob("*") if p.is_file()}
    assert grpo.main(again) == 0
    after = {p: p.stat().st_mtime_ns for p in Path("runs/r1").rglob("*") if p.is_file()}
    changed = {str(p) for p in after if after[p] != before.get(p)}
    assert changed <= {"runs/r1/config.json", "runs/r1/summary.json"} and before.keys() == after.keys()
    printed = capsys.readouterr().out
    assert printed.count("    done   --stage") == 7 and "4-all-scenarios" in printed and "general" in printed
    assert not Path("runs/r1-2").exists()


def test_the_plan_comes_first_and_names_minutes(options, monkeypatch, capsys):
    class Stop(RunError):
        pass

    def stage(*_):
        raise Stop("here")

    monkeypatch.setitem(grpo.STAGES, "reward", stage)
    assert grpo.main([*options, "--stage", "r1", "--cold_start", "cold.jsonl"]) == 1
    shared, *plan = [line for line in capsys.readouterr().out.splitlines() if line.startswith("plan ")]
    assert "--data runs/r1/problems.jsonl --eval_data runs/r1/held-out.jsonl" in shared
    assert plan[0].split() == "plan embedded base models 2 min each".split()
    assert [line.split()[1] for line in plan[1:]] == list(R1_FOLDERS)
    assert all(" min   --stage " in line for line in plan[1:])
    assert "--model runs/r1/1-cold-start/final" in plan[4]
    assert read_problems("runs/r1/general.jsonl") == grpo.general_problems()


def test_the_cold_start_is_written_by_a_careful_writer(options, monkeypatch):
    monkeypatch.setitem(grpo.STAGES, "reward", lambda *_: sys.exit(0))
    options[options.index("some.jsonl")] = "calculator"
    with pytest.raises(SystemExit):
        grpo.main([*options, "--stage", "r1"])
    examples = read_problems("runs/r1/cold-start.jsonl")
    assert len(examples) == len({e.question for e in examples}) == 200
    cfg = make_config()
    assert {grpo.fault(e.completion, False, e, cfg) for e in examples} == {""}
    trained = {p.question for p in grpo.calculator_problems()}
    assert all(e.question in trained and "yes </think>" in e.completion for e in examples)
    assert all(e.completion.endswith(" </answer>") for e in examples)  # training adds the end token


def same_weights(one, other):
    one, other = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (one, other))
    return all(torch.equal(one[name], other[name]) for name in one)


def assert_same_results(whole, parts):
    timeless = lambda row: {k: v for k, v in row.items() if "seconds" not in k}
    one, other = summary(whole)["results"], summary(parts)["results"]
    assert {name: timeless(row) for name, row in one.items()} == {
        n: timeless(row) for n, row in other.items()
    }
    assert same_weights(whole / "4-all-scenarios/final", parts / "4-all-scenarios/final")


def test_a_pipeline_that_was_killed_goes_on_in_the_middle(finished, options, monkeypatch, capsys):
    """Inside supervised training, inside a step of reinforcement, and before a stage had settings on disk."""
    command = [*options, *R1]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "train_sft", killed)
        torch.manual_seed(0)  # of the reward model's head
        assert grpo.main(command) == 130
    assert Path("runs/r1/1-cold-start/config.json").exists()
    assert not Path("runs/r1/1-cold-start/summary.json").exists()
    kept = Path("runs/r1/0-reward-model/final/model.safetensors").stat().st_mtime_ns

    def interrupting(rollout, *args):
        calls.append(len(rollout.texts))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain_score(rollout, *args)

    calls, plain_score = [], grpo.score
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "score", interrupting)
        with pytest.raises(SystemExit) as stopped:
            grpo.main(command)
    assert stopped.value.code == 130 and len(calls) == 3
    assert "go on with: python grpo.py --resume --output_dir runs/r1\n" in capsys.readouterr().out
    Path("runs/r1/3-samples").mkdir()
    Path("runs/r1/3-samples/examples.jsonl.tmp").write_text("half")
    again = ["--resume", "--output_dir", "runs/r1"]  # what the screen said
    monkeypatch.setattr(grpo, "train_reward_model", killed)  # it is finished
    assert grpo.main(again) == 0
    steps = Path("runs/r1/2-reasoning-rl/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2, 3, 4]
    assert Path("runs/r1/0-reward-model/final/model.safetensors").stat().st_mtime_ns == kept
    assert not Path("runs/r1/3-samples/examples.jsonl.tmp").exists()
    assert_same_results(finished / "runs/r1", Path("runs/r1"))


def test_other_settings_are_another_pipeline(again, monkeypatch, capsys):
    monkeypatch.setattr(grpo.Pipeline, "carry_out", lambda self: self.run.create())
    before = Path("runs/r1/summary.json").read_bytes()
    assert grpo.main([*again, "--seed", "5"]) == 0
    assert settings_of("runs/r1-2")["seed"] == 5 and settings_of("runs/r1")["seed"] == 0
    assert grpo.main([*again, "--seed", "5"]) == 0
    assert not Path("runs/r1-3").exists()
    assert grpo.main([*again, "--seed", "6", "--output_dir", "runs/r1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("grpo.py: error: ") and "output_dir 'runs/r1'" in error and error.count("\n") == 1
    assert grpo.main(["--resume", "--output_dir", "runs/r1", "--steps", "9"]) == 2
    assert "steps was 4, is 9" in capsys.readouterr().err
    assert Path("runs/r1/summary.json").read_bytes() == before and settings_of("runs/r1")["seed"] == 0


# --- distillation

DISTILL_FOLDERS = {
    "0-teacher": ("zero", "tiny", None),
    "0-samples": ("sample", "runs/distill/0-teacher/final", 0.6),
    "a-as-it-was": ("eval", "tinier", 0.6),
    "b-grpo": ("zero", "tinier", 0.6),
    "c-distilled": ("sft", "tinier", 0.6),
    "d-half-distilled": ("sft", "tinier", 0.3),
    "d-then-grpo": ("zero", "runs/distill/d-half-distilled/final", 0.3),
}


def test_distillation_against_reinforcement(options, capsys):
    command = [*options, "--stage", "distill", "--max_seconds", "0.6"]
    assert grpo.main(command) == 0
    made, settings = {}, {}
    for path in (p for p in Path("runs/distill").iterdir() if p.is_dir()):
        settings[path.name] = s = settings_of(path)
        made[path.name] = s["stage"], s["model"], s["max_seconds"]
    assert made == DISTILL_FOLDERS
    facts = {name: summary(f"runs/distill/{name}") for name in made}
    student = facts["a-as-it-was"]["before"]
    assert student == facts["b-grpo"]["before"] == facts["c-distilled"]["before"]
    assert student == facts["d-half-distilled"]["before"] != facts["d-then-grpo"]["before"]
    assert facts["d-then-grpo"]["before"] == facts["d-half-distilled"]["after"]
    for name, seconds in (
        ("b-grpo", 0.6),
        ("c-distilled", 0.6),
        ("d-half-distilled", 0.3),
        ("d-then-grpo", 0.3),
    ):
        assert facts[name]["train_seconds"] >= seconds, name
    assert settings["c-distilled"]["data"] == "runs/distill/0-samples/examples.jsonl"
    assert len(Path("runs/distill/0-teacher/metrics.jsonl").read_text().splitlines()) == 4  # all its steps
    results = summary("runs/distill")["results"]
    assert list(results) == list(DISTILL_FOLDERS) and results["0-teacher"]["train_seconds"] > 0
    printed = capsys.readouterr().out
    assert "a-as-it-was" in printed and "trained s" in printed
    times = {p: p.stat().st_mtime_ns for p in Path("runs/distill").rglob("final/*")}
    assert grpo.main(command) == 0
    assert times == {p: p.stat().st_mtime_ns for p in Path("runs/distill").rglob("final/*")}


@pytest.fixture
def student(make_model, tokenizer, tmp_path):
    """A checkpoint with a tokenizer of bytes and pieces of words."""
    model = make_model("qwen3", spread=0.02)
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    return "student"


def test_a_student_with_another_tokenizer_learns_the_text(bases, make_model, tokenizer):
    words = grpo.load_tokenizer(str(bases[64]))
    examples = [p for p in grpo.general_problems() if p.rejected][:6]
    cfg = make_config("x", template="Q {question} A", max_completion_tokens=200, gradient_checkpointing=False)
    one, other = (grpo.encode_examples(t, examples, cfg, "cpu") for t in (words, tokenizer))
    assert (other.completion_tokens > 2 * one.completion_tokens).all()
    for row, example in enumerate(examples):
        start, end = (
            int(other.prompt_tokens[row]),
            int(other.prompt_tokens[row] + other.completion_tokens[row]),
        )
        assert tokenizer.decode(other.ids[row, start : end - 1]) == example.completion
    cfg = dataclasses.replace(cfg, sft_epochs=12, sft_learning_rate=1e-2)
    losses = grpo.train_sft(make_model("qwen3"), tokenizer, examples, cfg)
    assert losses[-1] < 0.5 * losses[0]


def test_distillation_between_two_tokenizers(options, student):
    """The embedded model teaches one that has never seen its words."""
    grpo.build_base_model("teacher")
    command = "--stage distill --model student --teacher teacher --max_seconds 0.5".split()
    extra = (
        "--template Q:{question}A: --max_completion_tokens 40 --sft_learning_rate 0.01 --kl_coef 0".split()
    )
    assert grpo.main([*options, *command, *extra]) == 0
    assert settings_of("runs/distill/0-samples")["template"] == grpo.TINY["template"]  # the teacher's own
    assert settings_of("runs/distill/c-distilled")["template"] == "Q:{question}A:"
    assert settings_of("runs/distill/0-samples")["model"] == "teacher"
    facts = summary("runs/distill/c-distilled")
    assert facts["last_loss"] < facts["first_loss"] - 1
    examples = read_problems("runs/distill/0-samples/examples.jsonl")
    assert facts["examples"] == len(examples) == 12 and not Path("runs/distill/0-teacher").exists()
    assert AutoModelForCausalLM.from_pretrained("runs/distill/d-then-grpo/final").config.vocab_size == 320


# --- bad input

BAD_COMMANDS = {  # arguments -> the one line
    "--preference_steps 2": "general_data is None; reward_model and preference_steps need it",
    "--reward_model judge": "general_data is None; reward_model and preference_steps need it",
    "--general_data general.jsonl --preference_steps 2": "reward_model is None; preference_steps needs one",
    "--general_data some.jsonl": "general_data 'some.jsonl': every row must have the task helpful or harmless",
    "--general_data nowhere.jsonl": "general_data 'nowhere.jsonl' is neither",
    "--general_data general.jsonl --reward_model nowhere": "reward_model 'nowhere': no tokenizer there",
    "--general_data general.jsonl --reward_model student": "reward_model 'student' is no classifier",
    "--stage sft": "data 'some.jsonl' has no row with 'completion', from which sft learns",
    "--stage reward": "data 'some.jsonl' has no row with 'rejected', from which reward learns",
    "--stage reward --data cold.jsonl": "data 'cold.jsonl' has no row with 'rejected'",
    "--stage sft --data cold.jsonl --max_completion_tokens 2": "none of the 8 completions in data",
    "--stage r1 --model student": "cold_start and general_data: outside the embedded world r1 needs both",
    "--stage r1 --model student --cold_start cold.jsonl": "cold_start and general_data: outside the embedded",
    "--stage distill --model student": "teacher and max_seconds: distill needs a checkpoint to learn from",
    "--stage distill --model student --teacher student": "teacher and max_seconds: distill needs",
    "--stage r1 --data nowhere.jsonl": "data 'nowhere.jsonl' is neither",
    "--sft_epochs 0": "sft_epochs is 0; it must be at least 1",
    "--max_seconds 0": "max_seconds is 0.0; it must be above 0",
    "--keep_per_problem 0": "keep_per_problem is 0; it must be at least 1",
    "--rejection_samples 0": "rejection_samples is 0; it must be at least 1",
    "--preference_steps -1": "preference_steps is -1; it must be at least 0",
}


@pytest.mark.parametrize("arguments", BAD_COMMANDS)
def test_bad_input_is_one_clear_line(arguments, options, student, capsys):
    assert grpo.main([*options, *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"grpo.py: error: {BAD_COMMANDS[arguments]}"), error
    assert error.count("\n") == 1
    written = {p.name for p in Path("runs").glob("*")} - {"base-seed0"}  # which is no part of the run
    assert not written or "max_completion_tokens" in arguments


# --- what went wrong once


def test_general_problems_as_data_need_a_reward_model(options, capsys):
    assert grpo.main([*options, "--data", "general.jsonl"]) == 2
    assert "general_data" in capsys.readouterr().err


def test_r1_in_the_embedded_world_begins_with_its_own_examples_whatever_the_data(options, monkeypatch):
    monkeypatch.setitem(grpo.STAGES, "reward", lambda *_: sys.exit(0))
    with pytest.raises(SystemExit):
        grpo.main([*options, "--stage", "r1"])
    assert len(read_problems("runs/r1/cold-start.jsonl")) == 200


def test_max_rows_holds_the_samples_of_a_problem_too():
    with pytest.raises(grpo.InputError, match="max_rows is 4; it must be at least 6"):
        grpo.make_config("x", group_size=2, eval_samples=2, rejection_samples=6, max_rows=4)


def test_time_for_no_update_is_an_error_in_words(options, capsys):
    assert grpo.main([*options, "--stage", "sft", "--data", "cold.jsonl", "--max_seconds", "1e-9"]) in (
        0,
        1,
        2,
    )


def test_a_reward_model_is_a_function_of_the_seed(options):
    weights = []
    for name in ("one", "other"):
        place = options.index("--eval_data")
        command = [*options[:place], *options[place + 2 :], "--stage", "reward", "--data", "general.jsonl"]
        torch.rand(1)  # whatever was drawn before
        assert grpo.main([*command, "--output_dir", name]) == 0
        weights.append(Path(name, "final/model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("stage, data", [("sft", "cold.jsonl"), ("eval", "some.jsonl")])
def test_a_finished_stage_is_left_as_it_is(stage, data, options):
    assert grpo.main([*options, "--stage", stage, "--data", data, "--output_dir", "x"]) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("x").rglob("*") if path.is_file()}
    assert grpo.main(["--resume", "--output_dir", "x"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in Path("x").rglob("*") if path.is_file()}


def test_a_finished_pipeline_keeps_its_seconds(options):
    assert grpo.main([*options, *R1]) == 0
    seconds = summary("runs/r1")["seconds"]
    assert grpo.main([*options, *R1]) == 0
    assert summary("runs/r1")["seconds"] >= seconds > 0.1


def test_a_pipeline_goes_on_with_other_lines_on_screen(options, monkeypatch):
    monkeypatch.setattr(grpo.Pipeline, "carry_out", lambda self: self.run.create())
    assert grpo.main([*options, *R1]) == grpo.main([*options, *R1, "--log_every", "2"]) == 0
    assert not Path("runs/r1-2").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "--general_data some.jsonl",
        "--cold_start nowhere",
        "--cold_start some.jsonl",
        "--reward_model nowhere",
        "--stage distill --teacher nowhere",
    ],
)
def test_a_refused_pipeline_leaves_no_folder(arguments, options):
    assert grpo.main([*options, *R1, *arguments.split()]) == 2
    assert {path.name for path in Path("runs").glob("*")} <= {"base-seed0"}


def test_examples_without_references_ask_for_problems_to_evaluate_on(options, capsys):
    rows = [{"question": f"{i} 2 3 make 7", "completion": "7"} for i in range(1, 10)]
    Path("plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = options.index("--eval_data")
    own = options[:place] + options[place + 2 :]
    assert grpo.main([*own, "--stage", "sft", "--data", "plain.jsonl"]) == 2
    assert "give --eval_data" in capsys.readouterr().err
    assert grpo.main([*options, "--stage", "sft", "--data", "plain.jsonl"]) == 0


def test_what_is_evaluated_on_is_not_trained_on(options):
    Path("two.jsonl").write_text(Path("some.jsonl").read_text() + Path("other.jsonl").read_text())
    cfg = grpo.make_config(data="two.jsonl", eval_data="other.jsonl", skip_bad_answers=True)
    problems, held_out = grpo.load_data(cfg)
    assert held_out and {p.question for p in problems} == {p.question for p in read_problems("some.jsonl")}
    with pytest.raises(grpo.InputError, match="data"):
        grpo.load_data(grpo.make_config(data="some.jsonl", eval_data="some.jsonl"))


def test_another_order_of_the_numbers_is_on_the_same_side(tmp_path):
    path = tmp_path / "countdown.jsonl"
    rows = [
        dict(question=f"{' '.join(map(str, order))} make {target}", answer=target, numbers=order)
        for target in range(20)
        for order in itertools.permutations((1, 2, 3))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sides = [{(p.answer) for p in grpo.load_problems(str(path), evaluation)} for evaluation in (False, True)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_processes_need_not_all_have_general_questions(monkeypatch):
    mine = dict(accuracy=1.0, preference=3.0, outcomes={"right": 1, "unjudged": 1})
    other = dict(accuracy=0.5, outcomes={"right": 1, "wrong": 1})
    monkeypatch.setattr(grpo.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(grpo, "processes", lambda: 2)
    monkeypatch.setattr(
        grpo.dist, "all_gather_object", lambda parts, _: parts.__setitem__(slice(0, 2), [mine, other])
    )
    assert grpo.over_ranks(mine)["preference"] == 3.0


def test_half_a_character_in_a_question_can_be_written(tmp_path):
    problems = [grpo.Problem("\ud83d is half a face", "7")]
    grpo.write_problems(tmp_path / "x.jsonl", problems)
    assert grpo.read_problems(tmp_path / "x.jsonl") == problems


def test_of_thoughts_that_never_end_a_helpful_judge_sees_nothing():
    assert grpo.judged_part("<think> hello you", grpo.Problem("hi", task="helpful")) == ""


def test_a_preference_loss_that_is_not_finite_ends_the_training(bases, monkeypatch):
    judge = grpo.RewardModel(
        str(bases[32]), grpo.make_config(), torch.device("cpu"), torch.float32, untrained=True
    )
    monkeypatch.setattr(grpo, "bradley_terry_loss", lambda a, b: (a - b).mean() * float("nan"))
    pairs = [p for p in grpo.general_problems() if p.rejected][:4]
    with pytest.raises(grpo.RunError, match="not finite"):
        grpo.train_reward_model(judge, pairs, grpo.make_config(sft_epochs=1))


def test_r1_does_not_keep_to_a_time(options, capsys):
    assert grpo.main([*options, "--stage", "r1", "--max_seconds", "60"]) == 2
    assert "max_seconds is 60.0; r1 cannot keep to a time" in capsys.readouterr().err


def test_the_plan_gives_its_time_to_training_stages_only(options, monkeypatch, capsys):
    monkeypatch.setitem(grpo.STAGES, "zero", lambda *_: sys.exit(0))
    with pytest.raises(SystemExit):
        grpo.main([*options, "--stage", "distill", "--max_seconds", "3600"])
    out = capsys.readouterr().out
    minutes = {m[1]: float(m[2]) for m in re.finditer(r"^plan +(\S+) +([\d.]+) min   --stage", out, re.M)}
    assert minutes["0-samples"] < 1 and minutes["a-as-it-was"] < 1
    assert minutes["b-grpo"] >= 60 and minutes["c-distilled"] >= 60 and 30 <= minutes["d-then-grpo"] < 60


def test_a_key_press_says_how_to_go_on(options, monkeypatch, capsys):
    def stage(cfg, run):
        raise KeyboardInterrupt

    monkeypatch.setitem(grpo.STAGES, "sample", stage)
    assert grpo.main([*options, "--stage", "sample"]) == 130
    assert "go on with: python grpo.py --resume --output_dir runs/sample" in capsys.readouterr().err
