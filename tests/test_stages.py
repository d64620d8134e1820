"""Stages: what is learned from and by whom it is judged, the embedded world, and the command line of every stage.

The embedded base models of these tests are untrained: what counts is the way that files, settings and models go from
one stage to the next. The oracle of a recipe that was killed is the one that nobody disturbed.
"""

import dataclasses
import json
import os
import random
import re
import shlex
import shutil
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import grpo
from grpo import GENERAL, Problem, make_config, read_problems, write_problems

JUDGE = grpo.grade
GOOD = "<think> 1 + 1 is 2 </think> <answer> 2 </answer>"
SUM, HELLO, BAD = Problem("1 + 1?", "2"), Problem("hello", task="helpful"), Problem("help bad", task="harmless")


# --- the score


class Judge:
    """Scores by length; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, pairs):
        self.asked += pairs
        return [float(len(text)) for text, _ in pairs]


@pytest.mark.parametrize("language_weight", (0.0, 0.5))
def test_rules_judge_reasoning_and_the_reward_model_the_rest(language_weight):
    judge, cfg = Judge(), make_config("x", format_weight=3.0, language_weight=language_weight)
    texts = [GOOD, "2", "<think> 我 hi </think> hello", "hello", "<think> no </think> no", ""]
    rewards, parts, outcomes = grpo.score(SimpleNamespace(texts=texts), [SUM, HELLO, BAD], cfg, judge)
    lengths = [len(text) for text in texts]
    assert parts["accuracy"] == [1.0, 0.0, None, None, None, None]
    assert parts["format"] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert parts["preference"] == [None, None, *lengths[2:]]
    assert judge.asked == [*zip(texts[2:], [HELLO, HELLO, BAD, BAD])]
    language = [1.0, 1.0, 0.5, 1.0, 1.0, 1.0]
    assert parts["language"] == language  # shown even where it weighs nothing
    expected = [4.0, 0.0, 3.0 + lengths[2], lengths[3], 3.0 + lengths[4], lengths[5]]
    expected = torch.tensor([r + language_weight * value for r, value in zip(expected, language)])
    torch.testing.assert_close(rewards, expected.view(3, 2))
    assert outcomes == Counter(right=1, no_answer=1, unjudged=4)
    assert grpo.score(SimpleNamespace(texts=[GOOD, "2"]), [SUM], cfg)[0].shape == (1, 2)  # needs no reward model


@pytest.mark.parametrize("text, problem, seen", [
    ("<think> a </think> <answer> b </answer>", HELLO, "<answer> b </answer>"), ("b", HELLO, "b"),
    ("<think> a </think> b", BAD, "<think> a </think> b"), ("<think> hello you", HELLO, "")])
def test_a_helpful_judge_sees_the_answer_a_harmless_one_everything(text, problem, seen):
    assert grpo.judged_part(text, problem) == seen


def test_general_questions_are_half_of_the_last_steps_only(make_model, tokenizer, monkeypatch):
    rule = lambda text, problem, lenient=False: (None, "unjudged" if problem.task in GENERAL else "right")  # noqa: E731
    monkeypatch.setattr(grpo, "grade", rule)
    cfg = make_config("x", gradient_checkpointing=False, prompts_per_step=4, group_size=2, max_completion_tokens=4,
                      steps=5, preference_steps=2, kl_coef=0.0, general_data="-", reward_model="-")
    problems = [Problem(str(n), "2") for n in range(7)]
    steps = [*grpo.train_grpo(make_model(), tokenizer, problems, cfg, None, [HELLO, BAD, HELLO], Judge())]
    shares = [sum(problem.task in GENERAL for problem in batch) for _, _, batch, _ in steps]
    assert shares == [0, 0, 0, 2, 2]
    for metrics, rollout, batch, _ in steps:  # what does not apply has no part in a mean
        asked = [len(rollout.texts[2 * i + k]) for i in range(4) for k in (0, 1) if batch[i].task in GENERAL]
        assert metrics["accuracy"] == 1.0 and metrics.get("preference") == (grpo.mean(asked) if asked else None)
        assert metrics["outcomes"] == {k: v for k, v in dict(unjudged=len(asked), right=8 - len(asked)).items() if v}
    assert grpo.mean([1.0, None, 0.0, None]) == 0.5 and grpo.mean([None]) == 0.0


# --- rejection sampling

WRONG, OTHER = GOOD.replace("> 2", "> 3"), GOOD.replace("is 2", "makes 2")


@pytest.mark.parametrize("completion, truncated, reason", [
    (GOOD, False, ""), (GOOD, True, "truncated"), (WRONG, False, "not right"),
    ("<answer> 2 </answer>", False, "unreadable"), (GOOD.replace("is", "等 is"), False, "mixed language"),
    ("<answer> 3 </answer>", True, "truncated"), ("等 <answer> 3 </answer>", False, "not right"),  # the first is named
    ("<think> 等 <answer> 2 </answer> </think> <think> </think> <answer> 2 </answer>", False, "unreadable")])
def test_a_fault_has_a_name(completion, truncated, reason):
    assert grpo.fault(completion, truncated, SUM) == reason


def test_rejection_sampling_keeps_the_first_without_fault(monkeypatch):
    texts = {"a": [GOOD, GOOD, WRONG, OTHER], "b": [WRONG] * 4, "c": [WRONG, OTHER, GOOD, OTHER],
             "d": [GOOD, GOOD, GOOD, GOOD], "e": [OTHER, GOOD.replace("is", "为"), GOOD, GOOD]}
    asked = []

    def sample_for(model, tokenizer, problems, cfg, group_size, seed, temperature=None, top_p=1.0):
        asked.append(("".join(p.question for p in problems), group_size, seed, temperature, top_p))
        cut = [p.question == "e" and i == 0 for p in problems for i in range(4)]
        drawn = [text for p in problems for text in texts[p.question]]
        return SimpleNamespace(texts=drawn, truncated=torch.tensor(cut))

    monkeypatch.setattr(grpo, "sample_for", sample_for)
    problems = [Problem(name, "2") for name in texts]
    cfg = make_config("x", rejection_samples=4, max_rows=8)
    examples, faults = grpo.rejection_sample(None, None, problems, cfg)
    assert {e.question: e.completion for e in examples} == {"a": GOOD, "c": OTHER, "d": GOOD, "e": GOOD}
    assert len(examples) == 4 and all(dataclasses.replace(e, completion="") in problems for e in examples)
    assert faults == {"none": 12, "not right": 6, "mixed language": 1, "truncated": 1}
    assert asked == [("abcde", 4, 0, None, 1.0)]  # as in training


def test_a_model_learns_from_its_own_right_completions(make_model, tokenizer):
    """From the first to the last: examples, a model that learned them, its own right completions, the same again."""
    cfg = make_config("x", template="Q {question} A", max_completion_tokens=60, sft_epochs=40, sft_learning_rate=1e-2,
                      sft_batch_size=2, rejection_samples=3, gradient_checkpointing=False, temperature=0.3)
    problems = [Problem("3 + 4", "7"), Problem("4 + 4", "8"), Problem("5 + 4", "0")]
    taught = ["<think> 3 + 4 is 7 </think> <answer> 7 </answer>", GOOD.replace("2", "8")]
    teach = [dataclasses.replace(p, completion=text) for p, text in zip(problems, taught)]
    model = make_model("qwen3")
    grpo.train_sft(model, tokenizer, teach, cfg)
    examples, faults = grpo.rejection_sample(model, tokenizer, problems, cfg)
    assert examples == teach and faults["not right"] >= 3 and faults.total() == 9


# --- the embedded world


@pytest.fixture(scope="session")
def words():
    return grpo.build_tokenizer()


def test_calculator_problems_are_right_and_every_try_is_arithmetic():
    problems = [*grpo.calculator_problems(), *grpo.calculator_problems(True)]
    assert len({p.question for p in problems}) == len(problems) > 2000
    for problem in random.Random(0).sample(problems, 200):
        results = []
        for x, op, y, _, subtotal, op2, z, _, result in grpo.calculator_tries(problem.numbers):
            assert eval(f"({x}{op}{y}){op2}{z}") == result and eval(f"{x}{op}{y}") == subtotal  # noqa: S307
            results += [result] * grpo.countdown_equal(f"{x}{op}{y}{op2}{z}", problem.numbers, result)
        assert len(results) == 9 and int(problem.answer) in results and 1 <= int(problem.answer) <= 50
        assert problem.question == f"{' '.join(map(str, problem.numbers))} make {problem.answer}"


def test_the_tokenizer_knows_every_word_of_its_world_and_writes_it_back(words):
    rng, problems = random.Random(0), grpo.calculator_problems()
    texts = [" ".join(map(str, sum(grpo.write_document(rng, rng.choice(problems)), []))) for _ in range(500)]
    texts += [text for p in grpo.general_problems()[::7] for text in (p.question, p.completion, p.rejected) if text]
    spaces = re.compile(r" ?([-+*=]) ?")
    for text in texts:
        ids = words(text)["input_ids"]
        assert words.unk_token_id not in ids
        assert spaces.sub(r"\1", words.decode(ids)) == spaces.sub(r"\1", text)
    assert words("9*4=36")["input_ids"] == words("9 * 4 = 36")["input_ids"] and len(words("4-7=-3")["input_ids"]) == 5
    assert words("hello giraffe")["input_ids"][-1] == words.unk_token_id


def test_the_cold_start_is_written_by_a_careful_writer():
    examples = grpo.cold_start_traces(200, 0)
    assert examples == grpo.cold_start_traces(200, 0) != grpo.cold_start_traces(200, 1)
    assert len({e.question for e in examples}) == 200 and {grpo.fault(e.completion, False, e) for e in examples} == {""}
    assert {e.question for e in examples} <= {p.question for p in grpo.calculator_problems()}


def test_small_talk_has_pairs_and_examples_of_which_a_part_is_bad(tmp_path):
    problems = grpo.general_problems()
    pairs, examples = [p for p in problems if p.rejected], [p for p in problems if not p.rejected]
    assert problems == grpo.general_problems() and {p.task for p in problems} == {*GENERAL}
    good = {p.question: p.completion for p in pairs}
    assert len(good) > 300 and {p.question for p in examples} == {*good}
    assert all(grpo.format_reward(p.completion, p) == 1 and p.completion != p.rejected for p in pairs)
    assert 0.1 < grpo.mean(p.completion == good[p.question] for p in examples) < 0.6
    path = write_problems(tmp_path / "general.jsonl", problems)
    assert read_problems(path) == problems
    for evaluation in (False, True):  # a question once, with the good reply, which the judge is asked to compare with
        rows = grpo.load_general(make_config("x", general_data=path), evaluation)
        assert len({p.question for p in rows}) == len(rows) > 20
        assert all(p.completion == good[p.question] for p in rows)


def test_the_base_model_is_trained_once_and_learns_its_world(tmp_path, words):
    sizes = [sum(p.numel() for p in grpo.new_tiny_model(width).parameters()) for width in grpo.EMBEDDED.values()]
    assert 150_000 < sizes[0] < 300_000 and sizes[1] < 0.5 * sizes[0]
    folder = grpo.build_base_model(tmp_path / "base", seed=1, steps=60, width=32)
    weights = (folder / "model.safetensors").read_bytes()
    assert grpo.build_base_model(folder, seed=1, steps=60, width=32) == folder and grpo.is_tiny(str(folder))
    assert (folder / "model.safetensors").read_bytes() == weights  # it was there
    ids, labels = next(grpo.corpus_batches(random.Random(5)))
    loss = lambda model: model(ids, labels=labels).loss.item()  # noqa: E731
    trained = AutoModelForCausalLM.from_pretrained(folder)
    assert loss(trained) < 0.8 * loss(grpo.new_tiny_model(32)) and AutoTokenizer.from_pretrained(folder).eos_token


# --- the command line of every stage


def chance(text, problem, lenient=False):
    """Rewards that an untrained model earns now and then."""
    if problem.task in GENERAL:
        return None, "unjudged"
    return str(len(text) % 3), "wrong" if len(text) % 3 else "right"


EVAL = "--data some.jsonl --eval_data other.jsonl".split()
FLAGS = ("--prompts_per_step 4 --group_size 2 --steps 4 --eval_every 2 --max_completion_tokens 32 --eval_problems 3 "
         "--eval_samples 2 --rejection_samples 2 --sft_epochs 1 --sft_batch_size 4 --save_every 2 "
         "--sample_every 0").split()


def enter(folder, patch):
    """Work in a folder with small files of data, where base models need no training and everything is fit to learn."""
    patch.chdir(folder)
    patch.setattr(grpo, "pretrain", lambda *_: None)
    patch.setattr(grpo, "grade", chance)
    patch.setattr(grpo, "fault", lambda *_: "")
    patch.setattr(grpo, "hub_is_reachable", lambda: False)
    short = [p for p in grpo.cold_start_traces(300, 0) if len(p.completion.split()) < 28]
    write_problems(Path("some.jsonl"), grpo.calculator_problems()[:12])
    write_problems(Path("other.jsonl"), grpo.calculator_problems(True)[:6])
    write_problems(Path("cold.jsonl"), short[:8])
    talk = grpo.general_problems()
    asked = [*{p.question: None for p in talk}][:40]
    write_problems(Path("general.jsonl"), [p for p in talk if p.question in asked])
    return [*EVAL, *FLAGS]


@pytest.fixture
def options(tmp_path, monkeypatch):
    return enter(tmp_path, monkeypatch)


@pytest.fixture
def student(checkpoints, tmp_path):
    """A checkpoint with a tokenizer of bytes and pieces of words."""
    shutil.copytree(checkpoints / "qwen3", tmp_path / "student")
    return "student"


def summary(path):
    return json.loads(Path(path, "summary.json").read_text())


def settings_of(path):
    return json.loads(Path(path, "config.json").read_text())


def write_rows(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_supervised_training(options, capsys):
    assert grpo.main([*options, "--stage", "sft", "--data", "cold.jsonl", "--sft_epochs", "8"]) == 0
    facts = summary("runs/sft")
    assert "in the last of 16" in capsys.readouterr().out and facts["last_loss"] < facts["first_loss"] - 0.3
    assert facts["before"].keys() == facts["after"].keys()
    final, base = (AutoModelForCausalLM.from_pretrained(f"runs/{name}") for name in ("sft/final", "base-seed0"))
    assert grpo.is_tiny("runs/sft/final") and not torch.equal(final.lm_head.weight, base.lm_head.weight)
    files = {path: path.stat().st_mtime_ns for path in Path("runs/sft").rglob("final/*")}
    assert grpo.main(["--resume", "--output_dir", "runs/sft"]) == 0  # a finished stage is left as it is
    assert files == {path: path.stat().st_mtime_ns for path in files} and summary("runs/sft") == facts


def test_a_reward_model_is_a_function_of_the_seed_and_judges_a_run(options, capsys):
    weights = []
    for name in ("one", "other"):
        torch.rand(1)  # whatever was drawn before
        command = [*FLAGS, "--stage", "reward", "--data", "general.jsonl", "--sft_epochs", "12", "--output_dir", name]
        assert grpo.main(command) == 0
        weights.append(Path(name, "final/model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    facts = summary("one")
    assert facts["last_loss"] < 0.6 * facts["first_loss"] and facts["held_out_accuracy"] > 0.5
    assert re.search("3[0-9] problems to train on(.|\n)*of 3 held-out pairs", capsys.readouterr().out)
    assert AutoModelForSequenceClassification.from_pretrained("one/final").config.num_labels == 1
    judged = "--general_data general.jsonl --reward_model one/final --preference_steps 2".split()
    assert grpo.main([*options, *judged, "--steps", "5"]) == 0
    rows = [json.loads(line) for line in Path("runs/zero/metrics.jsonl").read_text().splitlines()]
    assert [row["outcomes"].get("unjudged", 0) for row in rows] == [0, 0, 0, 4, 4]
    assert ["preference" in row for row in rows] == [False, False, False, True, True]
    assert all(0 <= summary("runs/zero")["after"][name] <= 1 for name in ("judge", "helpful", "harmless"))


def test_samples_are_data_again(options, capsys):
    assert grpo.main([*options, "--stage", "sample"]) == 0
    examples, facts = read_problems("runs/sample/examples.jsonl"), summary("runs/sample")
    assert 12 * 2 == sum(facts["faults"].values()) and len(examples) == 12
    assert [dataclasses.replace(e, completion="") for e in examples] == read_problems("some.jsonl")
    assert grpo.main([*options, "--stage", "sft", "--data", "runs/sample/examples.jsonl"]) == 0
    assert "12 problems to train on" in capsys.readouterr().out


def test_a_model_without_a_right_completion_teaches_nothing(options, monkeypatch, capsys):
    monkeypatch.setattr(grpo, "fault", lambda *_: "not right")
    assert grpo.main([*options, "--stage", "sample"]) == 1
    assert re.search(r"stopped: no completion of tiny is fit .*'not right': 24", capsys.readouterr().err)
    assert not Path("runs/sample/examples.jsonl").exists() and not Path("runs/sample/summary.json").exists()


def test_evaluation_of_a_half_as_wide_model_on_words_it_does_not_know(options, capsys):
    write_rows("own.jsonl", [dict(question=f"Six times {n}?", answer=6 * n) for n in range(30)])
    assert grpo.main([*FLAGS, "--stage", "eval", "--model", "tinier", "--data", "own.jsonl"]) == 0
    assert summary("runs/eval")["before"]["problems"] == 3
    assert AutoModelForCausalLM.from_pretrained("runs/tinier-seed0").config.hidden_size == 32
    assert re.search(r"prompt .*User: <unk> <unk>", capsys.readouterr().out)


def test_code_is_data_too(options, monkeypatch):
    def sample_for(*args, **settings):  # programs, which no untrained model writes
        rollout = plain(*args, **settings)
        rollout.texts = ["<think> a </think> ```python\ndef square(x):\n    return x * x\n```"] * len(rollout.texts)
        return rollout

    plain = grpo.sample_for
    monkeypatch.setattr(grpo, "sample_for", sample_for)
    monkeypatch.setattr(grpo, "grade", JUDGE)
    tests = ["assert square(3) == 9"], ["assert square(3) == 9", "assert square(4) == 8"]
    for name, count in (("code.jsonl", 4), ("others.jsonl", 2)):
        write_rows(name, [dict(question=f"{name} {n}", tests=tests[n % 2]) for n in range(count)])
    data = "--model tinier --data code.jsonl --eval_data others.jsonl --eval_samples 1 --steps 1".split()
    assert grpo.main([*options, *data]) == 0
    assert json.loads(Path("runs/zero/metrics.jsonl").read_text())["outcomes"] == {"right": 4, "wrong": 4}
    assert summary("runs/zero")["after"]["pass_at_1"] == 0.5


def test_the_chat_template_is_what_an_instruct_model_sees(options, student, capsys):
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.chat_template = ("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|end|>{% endfor %}"
                               "{% if add_generation_prompt %}[assistant] {% endif %}")
    tokenizer.save_pretrained(student)
    assert grpo.main([*options, "--model", student, "--chat_template", "--steps", "1"]) == 0
    assert re.search(r"'\[user\] [\d ]+ make \d+<\|end\|>\[assistant\] '", capsys.readouterr().out)
    assert AutoTokenizer.from_pretrained("runs/zero/final").chat_template == tokenizer.chat_template


# --- R1

R1_FOLDERS = {  # stage of each folder, and the model that it starts from
    "0-base": ("eval", "tiny"), "1-cold-start": ("sft", "tiny"),
    "2-reasoning-rl": ("zero", "runs/r1/1-cold-start/final"), "3-samples": ("sample", "runs/r1/2-reasoning-rl/final"),
    "3-sft": ("sft", "tiny"), "4-pairs": ("sample", "runs/r1/3-sft/final"), "4-reward-model": ("reward", "tiny"),
    "4-all-scenarios": ("zero", "runs/r1/3-sft/final")}
R1 = "--stage r1 --cold_start cold.jsonl --general_data general.jsonl --learning_rate 0.001".split()
EVALUATED = [name for name in R1_FOLDERS if R1_FOLDERS[name][0] in ("eval", "sft", "zero")]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder in which r1 ran from beginning to end."""
    root = tmp_path_factory.mktemp("r1")
    with pytest.MonkeyPatch.context() as patch:
        assert grpo.main([*enter(root, patch), *R1]) == 0
    return root


def test_r1_has_the_papers_stages_and_starting_points(finished, monkeypatch):
    monkeypatch.chdir(finished)
    settings = {path.name: settings_of(path) for path in Path("runs/r1").iterdir() if path.is_dir()}
    assert {name: (s["stage"], s["model"]) for name, s in settings.items()} == R1_FOLDERS
    facts = {name: summary(f"runs/r1/{name}") for name in R1_FOLDERS}
    assert facts["3-sft"]["before"] == facts["0-base"]["before"] == facts["1-cold-start"]["before"]
    assert facts["2-reasoning-rl"]["before"] == facts["1-cold-start"]["after"] != facts["0-base"]["before"]
    assert facts["4-all-scenarios"]["before"].items() >= facts["3-sft"]["after"].items()  # and what the judge says
    assert facts["3-sft"]["after"] != facts["2-reasoning-rl"]["after"] and "judge" in facts["4-all-scenarios"]["after"]
    for name, expected in (("2-reasoning-rl", (1.0, 0, 1.0)), ("4-all-scenarios", (1.0, 8, 0.7))):
        assert tuple(settings[name][key] for key in ("language_weight", "preference_steps", "temperature")) == expected
    assert settings["4-all-scenarios"]["reward_model"] == "runs/r1/4-reward-model/final"
    assert {settings[name]["eval_data"] for name in EVALUATED} == {"runs/r1/held-out.jsonl"}
    assert read_problems("runs/r1/held-out.jsonl") == read_problems("other.jsonl")[:3]


def test_r1s_third_stage_mixes_reasoning_with_general_replies_and_the_table_has_all(finished, monkeypatch):
    monkeypatch.chdir(finished)
    rows = read_problems("runs/r1/mixed.jsonl")
    general = [p for p in rows if p.task in GENERAL]
    assert [p for p in rows if p.task not in GENERAL] == read_problems("runs/r1/3-samples/examples.jsonl")
    assert general == [p for p in grpo.load_problems("general.jsonl") if not p.rejected] and len(general) > 20
    results = summary("runs/r1")["results"]
    assert list(results) == list(R1_FOLDERS)
    for name in EVALUATED:  # what came out, not what went in
        facts = summary(f"runs/r1/{name}")
        assert results[name].items() >= facts.get("after", facts["before"]).items() and results[name]["helpful"] >= 0


def test_a_recipe_that_was_killed_goes_on_in_the_middle(finished, options, monkeypatch, capsys):
    """Inside supervised training, inside a step of reinforcement, and before a stage had settings on disk."""

    def pressed(*_):
        raise KeyboardInterrupt

    def interrupting(rollout, *args):
        calls.append(len(rollout.texts))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain_score(rollout, *args)

    def how_to_go_on():
        return shlex.split(capsys.readouterr().err.splitlines()[-1].partition("go on with: python grpo.py ")[2])

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "train_sft", pressed)
        assert grpo.main([*options, *R1]) == 130
    again = how_to_go_on()
    assert again == ["--resume", "--output_dir", "runs/r1"] and not Path("runs/r1/1-cold-start/summary.json").exists()
    kept = Path("runs/r1/0-base/summary.json").stat().st_mtime_ns
    calls, plain_score = [], grpo.score
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "score", interrupting)
        assert grpo.main(again) == 130
    assert len(calls) == 3 and how_to_go_on() == again
    Path("runs/r1/3-samples").mkdir()
    Path("runs/r1/3-samples/examples.jsonl.tmp").write_text("half")
    assert grpo.main(again) == 0
    assert Path("runs/r1/0-base/summary.json").stat().st_mtime_ns == kept  # it was finished
    one, other = (summary(root / "runs/r1")["results"] for root in (finished, Path()))
    timeless = lambda row: {k: v for k, v in row.items() if k != "seconds"}  # noqa: E731
    assert {name: timeless(row) for name, row in one.items()} == {name: timeless(row) for name, row in other.items()}
    for name in ("2-reasoning-rl", "4-all-scenarios"):
        path = f"runs/r1/{name}/final/model.safetensors"
        assert Path(path).read_bytes() == (finished / path).read_bytes(), name


def test_a_finished_recipe_is_left_as_it_is(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    state = lambda: {p: p.read_bytes() for p in Path("runs/r1").rglob("*") if p.suffix}  # noqa: E731
    before = state()
    assert grpo.main(["--resume", "--stage", "r1"]) == 0 and "is finished" in capsys.readouterr().out
    assert grpo.main(["--resume", "--output_dir", "runs/r1", "--seed", "5"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("grpo.py: error: ") and "runs/r1" in error and "seed was 0 and is 5" in error
    assert state() == before


# --- distillation

DISTILL_FOLDERS = {
    "0-teacher": ("zero", "tiny"), "0-samples": ("sample", "runs/distill/0-teacher/final"),
    "a-as-it-was": ("eval", "tinier"), "b-grpo": ("zero", "tinier"), "c-many": ("sft", "tinier"),
    "d-few": ("sft", "tinier"), "e-few-short": ("sft", "tinier"),
    "e-then-grpo": ("zero", "runs/distill/e-few-short/final")}


def test_distillation_against_reinforcement(options):
    assert grpo.main([*options, "--stage", "distill"]) == 0
    settings = {path.name: settings_of(path) for path in Path("runs/distill").iterdir() if path.is_dir()}
    assert {name: (s["stage"], s["model"]) for name, s in settings.items()} == DISTILL_FOLDERS
    facts = {name: summary(f"runs/distill/{name}") for name in DISTILL_FOLDERS}
    student = facts["a-as-it-was"]["before"]
    assert all(student == facts[name]["before"] for name in ("b-grpo", "c-many", "d-few", "e-few-short"))
    assert facts["e-then-grpo"]["before"] == facts["e-few-short"]["after"] != student
    assert settings["c-many"]["data"] == "runs/distill/0-samples/examples.jsonl"
    assert len(Path("runs/distill/0-teacher/metrics.jsonl").read_text().splitlines()) == 4  # all its steps
    assert list(summary("runs/distill")["results"]) == list(DISTILL_FOLDERS)
    Path("runs/distill/summary.json").unlink()  # it was killed at the very end
    times = {p: p.stat().st_mtime_ns for p in Path("runs/distill").rglob("final/*")}
    assert grpo.main(["--stage", "distill", "--resume"]) == 0 and Path("runs/distill/summary.json").exists()
    assert times == {p: p.stat().st_mtime_ns for p in Path("runs/distill").rglob("final/*")}


def test_distillation_between_two_tokenizers(options, student):
    """The embedded model teaches one that has never seen its words."""
    grpo.build_base_model("teacher")
    command = ("--stage distill --model student --teacher teacher --max_completion_tokens 110 --sft_learning_rate 0.01 "
               "--kl_coef 0 --template").split()
    assert grpo.main([*options, *command, grpo.TINY["template"]]) == 0  # one prompt, in the tokens of each
    samples = settings_of("runs/distill/0-samples")
    facts, examples = summary("runs/distill/c-many"), read_problems("runs/distill/0-samples/examples.jsonl")
    assert facts["last_loss"] < facts["first_loss"] and len(examples) == 12
    assert samples["model"] == "teacher" and not Path("runs/distill/0-teacher").exists()
    assert AutoModelForCausalLM.from_pretrained("runs/distill/e-then-grpo/final").config.vocab_size == 320


# --- bad input

BAD_COMMANDS = {  # arguments -> words of the one line
    "--general_data some.jsonl": "general_data some.jsonl helpful harmless",
    "--general_data nowhere.jsonl": "general_data nowhere.jsonl", "--stage sft": "data sft completion",
    "--general_data general.jsonl --reward_model nowhere": "reward_model nowhere",
    "--general_data general.jsonl --reward_model student": "reward_model student score",
    "--stage reward": "data reward rejected", "--stage reward --data cold.jsonl": "data reward rejected",
    "--stage sft --data cold.jsonl --max_completion_tokens 2": "max_completion_tokens",
    "--data general.jsonl": "data zero answer", "--stage r1 --model student": "cold_start r1",
    "--stage distill --model student": "teacher distill", "--stage r1 --data nowhere.jsonl": "data nowhere.jsonl",
    "--stage r1 --general_data some.jsonl": "general_data some.jsonl",
    "--stage r1 --cold_start nowhere": "cold_start nowhere",
    "--stage r1 --cold_start some.jsonl": "cold_start some.jsonl completion",
    "--stage r1 --reward_model nowhere": "reward_model nowhere", "--stage distill --teacher nowhere": "teacher nowhere",
    "--chat_template --model student": "chat_template tokenizer"}


@pytest.mark.parametrize("arguments", BAD_COMMANDS)
def test_bad_input_is_one_clear_line_and_leaves_no_folder(arguments, options, student, capsys):
    assert grpo.main([*options, *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("grpo.py: error: ") and error.count("\n") == 1, error
    assert all(word in error for word in BAD_COMMANDS[arguments].split()), error
    assert {path.name for path in Path("runs").glob("*")} <= {"base-seed0"}  # which is no part of the run


def test_a_damaged_base_model_is_named(options, capsys):
    folder = grpo.build_base_model("runs/base-seed0")
    os.truncate(folder / "model.safetensors", 5000)
    assert grpo.main(options) == 2
    assert re.search("grpo.py: error: .*runs/base-seed0", capsys.readouterr().err)


def test_a_recipe_that_fails_late_keeps_what_is_finished(options, capsys):
    assert grpo.main([*options, *R1, "--max_completion_tokens", "2"]) == 2
    assert "raise max_completion_tokens" in capsys.readouterr().err
    assert Path("runs/r1/0-base/summary.json").exists()


def test_a_preference_loss_that_is_not_finite_ends_the_training(options, monkeypatch):
    folder = grpo.build_base_model("base", width=32)
    judge = grpo.RewardModel(str(folder), make_config(), torch.device("cpu"), untrained=True)
    monkeypatch.setattr(judge, "scores", lambda rows: torch.full((len(rows),), float("nan"), requires_grad=True))
    with pytest.raises(grpo.RunError, match="not finite"):
        grpo.train_reward_model(judge, [p for p in grpo.general_problems() if p.rejected][:4], make_config())
