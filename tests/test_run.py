"""The command line from end to end, and what happens to a run that is stopped, killed, starved of disk or fed nonsense.

The oracle of a resumed run is the run that nobody disturbed: same metrics, same final weights, bit for bit.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo

CLOCK = {
    "seconds",
    "step_seconds",
    "sample_seconds",
    "update_seconds",
    "sample_tokens_per_second",
    "update_tokens_per_second",
}
METRICS = (
    "step seconds reward accuracy format mean_tokens truncated dead_groups reflection loss kl clip_fraction "
    "grad_norm entropy sample_tokens_per_second update_tokens_per_second"
).split()
RESULTS = (
    "pass_at_1 pass_at_1_ci95 maj_at_k k problems format_rate truncated_rate mean_tokens reflection_rate"
).split()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, make_model, tokenizer):
    """A folder with a random checkpoint of each architecture and GSM8K-style problems."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ("qwen2", "qwen3", "llama"):
        make_model(name).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = [
        {"question": f"What is {a} + {b}?", "answer": f"{a} and {b} make {a + b}.\n#### {a + b}"}
        for a in range(6)
        for b in range(5)
    ]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def command(checkpoints, tmp_path, monkeypatch):
    """The arguments of a short run in an empty folder, on rewards that a random model earns now and then."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        grpo, "grade", lambda text, problem, lenient=False: "wrong" if len(text) % 3 else "right"
    )
    return [
        "--model",
        str(checkpoints / "qwen2"),
        "--data",
        str(checkpoints / "sums.jsonl"),
        "--template",
        "Q {question} A",
        "--prompts_per_step",
        "2",
        "--group_size",
        "4",
        "--max_completion_tokens",
        "8",
        "--steps",
        "6",
        "--save_every",
        "2",
        "--eval_every",
        "3",
        "--eval_problems",
        "2",
        "--eval_samples",
        "2",
        "--learning_rate",
        "0.01",
        "--kl_coef",
        "0.05",
        "--ref_every",
        "2",
        "--sample_every",
        "2",
    ]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_clock(rows):
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def assert_same_run(one, other):
    assert without_clock(lines(f"{one}/metrics.jsonl")) == without_clock(lines(f"{other}/metrics.jsonl"))
    assert lines(f"{one}/evaluations.jsonl") == lines(f"{other}/evaluations.jsonl")
    weights, same = (
        AutoModelForCausalLM.from_pretrained(f"{run}/final").state_dict() for run in (one, other)
    )
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def in_child(work, limit=None) -> int:
    """Run `work()` in a forked child -> its process id; the child's exit status is what it returns."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            sys.stdout = sys.stderr = open("child.log", "a")
            if limit:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            status = work()
        except SystemExit as error:
            status = error.code
        finally:
            sys.stdout.flush()
            os._exit(status)
    return pid


def status_of(pid) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_every_architecture_trains_from_the_command_line(name, command, checkpoints):
    command[1] = str(checkpoints / name)
    assert grpo.main(command) == 0
    summary = json.loads(Path("runs/zero/summary.json").read_text())
    assert (
        summary["stage"] == "zero"
        and summary["seed"] == 0
        and summary["seconds"] > summary["train_seconds"] > 0
    )
    assert all(key in summary[when] for when in ("before", "after") for key in RESULTS)
    metrics = lines("runs/zero/metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6] and all(key in metrics[0] for key in METRICS)
    assert metrics[-1]["kl"] > 0
    assert abs(metrics[0]["ratio"] - 1) < 0.2 and metrics[0]["sampler_gap"] < 1e-4
    evaluations = lines("runs/zero/evaluations.jsonl")
    improved = evaluations[1]["pass_at_1"] > evaluations[0]["pass_at_1"]
    assert Path("runs/zero/best/model.safetensors").exists() == improved
    before, after = (
        AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (command[1], "runs/zero/final")
    )
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert AutoTokenizer.from_pretrained("runs/zero/final").eos_token_id == 0


def test_the_command_as_a_user_types_it(command, tmp_path):
    done = subprocess.run(
        [sys.executable, Path(grpo.__file__), *command, "--steps", "2"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for expected in (
        "cpu, float32",
        "qwen2",
        "27 problems to train on, 2 to evaluate on",
        "prompt    'Q What is",
        "stop tokens {0: '<|end|>'}",
        "step reward accuracy",
        "before",
        "pass_at_1_ci95",
        "wrote runs/zero/",
    ):
        assert expected in done.stdout
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_a_second_run_takes_the_next_folder_and_equals_the_first(command):
    assert grpo.main(command) == grpo.main(command) == 0
    assert_same_run("runs/zero", "runs/zero-2")


def test_evaluation_of_a_finished_run(command):
    assert grpo.main([*command, "--stage", "eval", "--seed", "0"]) == 0
    assert json.loads(Path("runs/eval/summary.json").read_text())["before"]["problems"] == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(command, dtype, signum, monkeypatch):
    command += ["--dtype", dtype]
    assert grpo.main([*command, "--output_dir", "whole"]) == 0
    plain, calls = grpo.grade, []

    def interrupting(text, problem, lenient=False):
        calls.append(text)
        if len(calls) == 30:
            os.kill(os.getpid(), signum)
        return plain(text, problem)

    monkeypatch.setattr(grpo, "grade", interrupting)
    with pytest.raises(SystemExit) as stopped:
        grpo.main([*command, "--output_dir", "parts"])
    assert stopped.value.code == 128 + signum
    assert 0 < len(lines("parts/metrics.jsonl")) < 6
    assert grpo.main(["--resume", "--output_dir", "parts"]) == 0
    assert_same_run("whole", "parts")


def test_a_run_killed_at_any_moment_goes_on_as_if_nothing_had_happened(command):
    command += ["--save_every", "1"]
    started = time.perf_counter()
    assert status_of(in_child(lambda: grpo.main([*command, "--output_dir", "whole"]))) == 0
    whole, rng, kills = time.perf_counter() - started, random.Random(0), 0
    for trial in range(16):
        parts = f"parts-{trial}"
        pid = in_child(lambda: grpo.main([*command, "--output_dir", parts]))
        time.sleep(rng.uniform(0.1, 0.9) * whole)
        os.kill(pid, signal.SIGKILL)
        kills += status_of(pid) == -signal.SIGKILL
        resume = ["--resume"] if Path(parts, "config.json").exists() else []
        assert status_of(in_child(lambda: grpo.main([*command, "--output_dir", parts, *resume]))) == 0
        assert_same_run("whole", parts)
    assert kills >= 10


@pytest.mark.parametrize("seed", range(10))
def test_a_kill_inside_a_save_leaves_a_checkpoint_to_go_on_from(command, seed, monkeypatch):
    """The process dies at a random one of the steps of writing a checkpoint."""
    assert grpo.main([*command, "--output_dir", "whole"]) == 0
    dies_at, calls = random.Random(seed).randrange(3, 30), []

    def deadly(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(grpo.os, "fsync", deadly(os.fsync))
        patch.setattr(grpo.os, "replace", deadly(os.replace))
        patch.setattr(grpo.shutil, "rmtree", deadly(grpo.shutil.rmtree))
        patch.setattr(grpo.torch, "save", deadly(torch.save))
        assert status_of(in_child(lambda: grpo.main([*command, "--output_dir", "parts"]))) == -signal.SIGKILL
    assert grpo.main([*command, "--output_dir", "parts", "--resume"]) == 0
    assert_same_run("whole", "parts")


def test_a_full_disk_keeps_the_checkpoint_before(command, capsys):
    assert grpo.main([*command, "--steps", "2", "--output_dir", "run"]) == 0
    size = max(path.stat().st_size for path in Path("run/checkpoint/step-000002").iterdir())
    pid = in_child(lambda: grpo.main([*command, "--output_dir", "run", "--resume"]), limit=size // 2)
    assert status_of(pid) == 1
    log = Path("child.log").read_text()
    assert "the checkpoint of step 4 could not be saved" in log and "--resume --output_dir run" in log
    assert [path.name for path in sorted(Path("run/checkpoint").glob("step-*"))] == ["step-000002"]
    assert grpo.main([*command, "--output_dir", "run", "--resume"]) == 0
    assert len(lines("run/metrics.jsonl")) == 6


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "files.json", "config.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(command, file, harm, capsys):
    assert grpo.main([*command, "--output_dir", "whole"]) == 0
    path = Path("whole/checkpoint/step-000006", file)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink() if harm == "remove" else path.write_bytes(
        data if harm == "flip" else data[: len(data) // 2]
    )
    (weights,) = [Path("whole/final/model.safetensors").read_bytes()]
    capsys.readouterr()
    assert grpo.main(["--output_dir", "whole", "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "step-000006 is damaged" in printed and (file in printed or file == "files.json")
    assert Path("whole/final/model.safetensors").read_bytes() == weights
    assert [m["step"] for m in lines("whole/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("bad_steps, status", [({2}, 0), ({2, 3}, 0), ({2, 3, 4}, 1)])
def test_updates_that_are_not_finite_are_left_out_and_kept(command, bad_steps, status, monkeypatch, capsys):
    plain, step = grpo.grpo_loss, []

    def loss(logprobs, *args, **kwargs):
        value, sums = plain(logprobs, *args, **kwargs)
        return value * (float("nan") if len(step) in bad_steps else 1.0), sums

    def sampled(*args, **kwargs):
        step.extend([1] if kwargs["group_size"] == 4 else [])
        return plain_sample(*args, **kwargs)

    plain_sample = grpo.sample_completions
    monkeypatch.setattr(grpo, "grpo_loss", loss)
    monkeypatch.setattr(grpo, "sample_completions", sampled)
    assert grpo.main([*command, "--output_dir", "run"]) == status
    assert {int(p.name.split("_")[3]) for p in Path("run").glob("not_finite_step_*")} == bad_steps
    assert lines("run/metrics.jsonl")[1]["grad_norm"] is None
    if status:
        assert (
            "in three steps in a row gradients were not finite; lower learning_rate"
            in capsys.readouterr().err
        )
    else:
        final = AutoModelForCausalLM.from_pretrained("run/final").state_dict()
        assert all(torch.isfinite(weight).all() for weight in final.values())


BAD = {  # arguments -> the one line
    "--group_size 1": "group_size is 1; it must be at least 2: an advantage compares completions of one prompt",
    "--temperature 0": "temperature is 0.0; it must be above 0",
    "--eval_top_p 1.5": "eval_top_p is 1.5; it must be above 0 and at most 1",
    "--learning_rate nan": "learning_rate is nan; it must be a finite number",
    "--updates_per_rollout 3": "updates_per_rollout is 3; it must divide the 8 completions of a step "
    "(prompts_per_step x group_size)",
    "--max_rows 2": "max_rows is 2; it must be at least 4, to hold one group",
    "--template none": "template is 'none'; it must be a text with {question} where the question goes",
    "--stage four": "argument --stage: invalid choice: 'four'",
    "--steps many": "argument --steps: invalid int value: 'many'; python grpo.py --help explains every setting",
    "--stepz 3": "--stepz is not a setting; python grpo.py --help explains every setting",
    "--data nowhere.jsonl": "data 'nowhere.jsonl' is neither countdown, calculator, gsm8k, math500 nor a file",
    "--model nowhere": "model 'nowhere': no tokenizer there",
    "--device gpu": "device is 'gpu'; it must be auto, cpu, cuda or cuda:N",
    "--output_dir full": "output_dir 'full' already holds a run or other files; go on with it by --resume, or name "
    "another folder",
    "--output_dir full/notes.txt": "output_dir 'full/notes.txt' already holds a run",
    "--resume --output_dir empty": "output_dir 'empty' holds no run to resume",
    "--max_prompt_tokens 3": "a question makes a prompt of",
    "--chat_template": "chat_template is True, but the tokenizer has none; leave it out or take an instruct model",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_clear_line(arguments, command, capsys):
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    assert grpo.main([*command, *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"grpo.py: error: {BAD[arguments]}") and error.count("\n") == 1
    assert Path("full/notes.txt").read_text() == "mine"
    assert not Path("runs").exists()  # a command that was refused leaves no folder behind


def test_a_finished_run_is_left_as_it_is(command, capsys):
    assert grpo.main([*command, "--output_dir", "run"]) == 0
    files = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert grpo.main(["--resume", "--output_dir", "run"]) == 0
    assert "run is finished; give more --steps" in capsys.readouterr().out
    assert grpo.main(["--resume", "--output_dir", "run", "--steps", "3"]) == 2
    assert "steps is 3, but the run is at step 6 already" in capsys.readouterr().err
    assert files == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    Path("run/summary.json").unlink()  # an unfinished one is recognised as well
    assert grpo.main(["--stage", "eval", "--model", "run"]) == 2
    assert "model 'run' is the folder of a run; its model is run/final" in capsys.readouterr().err


def test_references_that_cannot_be_matched_stop_the_run_or_are_left_out(command, checkpoints, capsys):
    rows = Path(command[3]).read_text() + json.dumps({"question": "Too long?", "answer": "9" * 400}) + "\n"
    Path("some.jsonl").write_text(rows)
    command[3] = "some.jsonl"
    assert grpo.main(command) == 2
    error = capsys.readouterr().err
    assert "data: 1 reference answers do not verify against themselves" in error and "'Too long?'" in error
    assert grpo.main([*command, "--skip_bad_answers", "--steps", "1"]) == 0


def test_two_processes_train_one_policy(command):
    """As torchrun starts them: each samples its share, one of them writes, both end alike."""
    port = str(29500 + os.getpid() % 1000)

    def work(rank):
        os.environ.update(
            LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        return grpo.main([*command, "--device", "cpu", "--output_dir", "both"])

    children = [in_child(lambda r=r: work(r)) for r in range(2)]
    assert [status_of(child) for child in children] == [0, 0], Path("child.log").read_text()
    metrics = lines("both/metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert sum(metrics[0]["outcomes"].values()) == 8  # the completions of both
    assert Path("both/final/model.safetensors").exists() and not Path("runs").exists()


def test_a_run_is_not_resumed_under_other_settings(command, capsys):
    assert grpo.main([*command, "--output_dir", "run"]) == 0
    assert grpo.main(["--resume", "--output_dir", "run", "--clip_eps", "0.3", "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "clip_eps was 0.2, is 0.3" in error and "seed was 0, is 1" in error
    assert grpo.main(["--resume", "--output_dir", "run", "--steps", "8", "--log_every", "2"]) == 0
    assert [m["step"] for m in lines("run/metrics.jsonl")] == list(range(1, 9))


def test_two_processes_make_the_gradients_of_one(make_model, random_rollout, tmp_path, monkeypatch):
    """Each takes half of the rows; the sums of gradients and counts run over both."""
    monkeypatch.chdir(tmp_path)
    cfg = grpo.make_config("none", kl_coef=0.0, micro_batch_tokens=64, max_completion_tokens=12)
    rollout = random_rollout(rows=8)

    def gradients(rows, average):
        model = make_model()
        optimizer = grpo.MasterAdamW(model, 1e-3)
        kept = {}
        optimizer.adamw.step = lambda: kept.update(
            {name: p.grad.clone() for name, p in model.named_parameters()}
        )
        norm = grpo.update_policy(
            model,
            optimizer,
            rollout.select(rows),
            grpo.dataclasses.replace(cfg, loss_average=average, max_grad_norm=1e9),
            1e-3,
        )["grad_norm"]
        return kept, norm

    def work(rank):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
        for average in ("sequence", "token", "constant"):
            result = gradients(torch.arange(8)[rank::2], average)
            torch.save(result, tmp_path / f"{average}-{rank}.pt")
        return 0

    children = [in_child(lambda r=r: work(r)) for r in range(2)]
    assert [status_of(child) for child in children] == [0, 0]
    for average in ("sequence", "token", "constant"):
        whole, norm = gradients(torch.arange(8), average)
        for rank in range(2):
            parts, part_norm = torch.load(tmp_path / f"{average}-{rank}.pt")
            assert all((whole[name] - parts[name]).abs().max() < 1e-6 for name in whole)
            assert abs(norm - part_norm) < 1e-5 * norm


def test_a_run_whose_numbers_were_not_all_finite_still_ends_with_its_table(tmp_path, capsys):
    run = grpo.Run(grpo.make_config(output_dir=str(tmp_path / "run")))
    run.create()
    run.facts["before"] = dict(pass_at_1=0.5)
    row = dict(accuracy=0.5, mean_tokens=3.0, reflection=0.0, entropy=float("nan"), update_peak_gb=0.0)
    run.metrics = [row, {**row, "entropy": None}]  # as computed, and as read back from the log
    run.finish()
    assert "mean_tokens  ▁▁ 3.00 -> 3.00" in capsys.readouterr().out
    assert (tmp_path / "run" / "summary.json").exists()


def test_the_doctor_names_what_is_wrong():
    healthy = dict(
        accuracy=0.5,
        truncated=0.1,
        dead_groups=0.3,
        clip_fraction=0.01,
        kl=0.01,
        entropy=0.3,
        sampler_gap=1e-6,
        grad_norm=0.5,
        outcomes={"right": 3, "wrong": 2},
    )
    cfg = grpo.make_config()
    assert grpo.doctor(healthy, cfg) == []
    assert grpo.doctor({**healthy, "dead_groups": 1.0, "accuracy": 0.97}, cfg) == []  # solved, not sick
    for change, words in (
        ({"truncated": 0.92}, "92% of completions hit max_completion_tokens"),
        ({"dead_groups": 1.0}, "all groups flat: no gradient"),
        ({"dead_groups": 0.9}, "90% of groups flat"),
        ({"clip_fraction": 0.5}, "the clip stops 50%"),
        ({"kl": 3.0}, "a KL of 3.0"),
        ({"entropy": 0.001}, "an entropy of 0.001"),
        ({"sampler_gap": 0.5}, "0.50 nats from those at sampling"),
        ({"grad_norm": float("nan")}, "not finite"),
        ({"outcomes": {"timeout": 2}}, "2 answers"),
    ):
        (sentence,) = grpo.doctor({**healthy, **change}, cfg)
        assert words in sentence


def test_a_sparkline_runs_from_the_lowest_to_the_highest_value():
    assert grpo.sparkline([0, 1, 2, 3]) == "▁▃▆█"
    assert grpo.sparkline([5.0] * 3) == "▁▁▁" and grpo.sparkline([]) == ""
    assert len(grpo.sparkline(list(range(1000)))) == 50
