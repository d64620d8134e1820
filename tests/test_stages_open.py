"""What does not hold yet. Each test is marked as one that fails; once it passes, the mark must go and it moves."""

import json
from pathlib import Path

import pytest
import torch
from test_stages import R1, bases, options, summary  # noqa: F401

import grpo


def open_question(reason, raises=AssertionError):
    return pytest.mark.xfail(strict=True, reason=reason, raises=raises)


@open_question("general problems reach score() without a reward model", TypeError)
def test_general_problems_as_data_need_a_reward_model(options, capsys):  # noqa: F811
    assert grpo.main([*options, "--data", "general.jsonl"]) == 2
    assert "reward_model" in capsys.readouterr().err


@open_question("the cold start is drawn from 200 calculator problems, whatever data there is", ValueError)
def test_r1_in_the_embedded_world_with_other_data_asks_for_a_cold_start(options, capsys):  # noqa: F811
    assert grpo.main([*options, "--stage", "r1"]) == 2
    assert "cold_start" in capsys.readouterr().err


@open_question("max_rows is held against group_size and eval_samples only", pytest.fail.Exception)
def test_max_rows_holds_the_samples_of_a_problem_too():
    with pytest.raises(grpo.InputError, match="max_rows is 4; it must be at least 6"):
        grpo.make_config("x", group_size=2, eval_samples=2, rejection_samples=6, max_rows=4)


@open_question("no update fits into so short a time", IndexError)
def test_time_for_no_update_is_an_error_in_words(options, capsys):  # noqa: F811
    assert grpo.main([*options, "--stage", "sft", "--data", "cold.jsonl", "--max_seconds", "1e-9"]) in (
        0,
        1,
        2,
    )


@open_question("the new head of a classifier is drawn from an unseeded generator")
def test_a_reward_model_is_a_function_of_the_seed(options):  # noqa: F811
    weights = []
    for name in ("one", "other"):
        command = ["--stage", "reward", "--data", "general.jsonl", "--eval_data", "general.jsonl"]
        assert grpo.main([*options, *command, "--output_dir", name]) == 0
        weights.append(Path(name, "final/model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@open_question("it is trained again from the beginning")
@pytest.mark.parametrize("stage, data", [("sft", "cold.jsonl"), ("eval", "some.jsonl")])
def test_a_finished_stage_is_left_as_it_is(stage, data, options):  # noqa: F811
    assert grpo.main([*options, "--stage", stage, "--data", data, "--output_dir", "x"]) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("x").rglob("*") if path.is_file()}
    assert grpo.main(["--resume", "--output_dir", "x"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in Path("x").rglob("*") if path.is_file()}


@open_question("the summary is written anew, with the seconds of the last command")
def test_a_finished_pipeline_keeps_its_seconds(options):  # noqa: F811
    assert grpo.main([*options, *R1]) == 0
    seconds = summary("runs/r1")["seconds"]
    assert grpo.main([*options, *R1]) == 0
    assert summary("runs/r1")["seconds"] >= seconds > 0.1


@open_question("run_folder compares settings that may change")
def test_a_pipeline_goes_on_with_other_lines_on_screen(options, monkeypatch):  # noqa: F811
    monkeypatch.setattr(grpo.Pipeline, "carry_out", lambda self: None)
    assert grpo.main([*options, *R1]) == grpo.main([*options, *R1, "--log_every", "2"]) == 0
    assert not Path("runs/r1-2").exists()


@open_question("a pipeline makes its folder before its stages have looked at their input")
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
def test_a_refused_pipeline_leaves_no_folder(arguments, options):  # noqa: F811
    assert grpo.main([*options, *R1, *arguments.split()]) == 2
    assert {path.name for path in Path("runs").glob("*")} <= {"base-seed0"}


@open_question("examples that are left out are counted")
def test_the_examples_in_the_summary_are_those_learned_from(options):  # noqa: F811
    rows = [json.loads(line) for line in Path("cold.jsonl").read_text().splitlines()]
    rows[0]["completion"] = "1 " * 40
    Path("cold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert grpo.main([*options, "--stage", "sft", "--data", "cold.jsonl"]) == 0
    assert summary("runs/sft")["examples"] == 7


@open_question("held-out rows without a reference are refused with a word on references")
def test_examples_without_references_can_be_learned_from(options):  # noqa: F811
    rows = [{"question": f"{i} 2 3 make 7", "completion": "7"} for i in range(1, 10)]
    Path("plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = options.index("--eval_data")
    own = options[:place] + options[place + 2 :]
    assert grpo.main([*own, "--stage", "sft", "--data", "plain.jsonl"]) == 0


@open_question("a process whose share holds no general question has no such number", KeyError)
def test_processes_need_not_all_have_general_questions(monkeypatch):
    mine = dict(accuracy=1.0, preference=3.0, outcomes={"right": 1, "unjudged": 1})
    other = dict(accuracy=0.5, outcomes={"right": 1, "wrong": 1})
    monkeypatch.setattr(grpo.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(grpo, "processes", lambda: 2)
    monkeypatch.setattr(
        grpo.dist, "all_gather_object", lambda parts, _: parts.__setitem__(slice(0, 2), [mine, other])
    )
    assert grpo.over_ranks(mine)["preference"] == 3.0


@open_question("half a character in a data file cannot be written", UnicodeEncodeError)
def test_half_a_character_in_a_question_can_be_written(tmp_path):
    problems = [grpo.Problem("\ud83d is half a face", "7")]
    grpo.write_problems(tmp_path / "x.jsonl", problems)
    assert grpo.read_problems(tmp_path / "x.jsonl") == problems


@open_question("thoughts that never end are judged as if they were the reply")
def test_of_thoughts_that_never_end_a_helpful_judge_sees_nothing():
    assert grpo.judged_part("<think> hello you", grpo.Problem("hi", task="helpful")) == ""


@open_question("only train_sft looks at its loss", pytest.fail.Exception)
def test_a_preference_loss_that_is_not_finite_ends_the_training(bases, monkeypatch):  # noqa: F811
    judge = grpo.RewardModel(
        str(bases[32]), grpo.make_config(), torch.device("cpu"), torch.float32, untrained=True
    )
    monkeypatch.setattr(grpo, "bradley_terry_loss", lambda a, b: (a - b).mean() * float("nan"))
    pairs = [p for p in grpo.general_problems() if p.rejected][:4]
    with pytest.raises(grpo.RunError, match="not finite"):
        grpo.train_reward_model(judge, pairs, grpo.make_config(sft_epochs=1))
