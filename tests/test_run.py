"""The command line from end to end, and what happens to a run that is stopped, killed, starved of disk or fed nonsense.

The oracle of a resumed run is the run that nobody disturbed: same logs, same final weights, bit for bit.
"""

import contextlib
import io
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import grpo

CLOCK = {"seconds", "step_seconds"}
FLAGS = ("--template Q{question}A --prompts_per_step 2 --group_size 4 --max_completion_tokens 8 --steps 6 "
         "--save_every 2 --eval_every 3 --eval_problems 2 --eval_samples 2 --learning_rate 0.01 --kl_coef 0.05 "
         "--ref_every 5 --sample_every 2 --seed 3 --no-gradient_checkpointing").split()


def chance(text, problem, lenient=False):
    """Rewards that a random model earns now and then."""
    return str(len(text) % 3), "wrong" if len(text) % 3 else "right"


def arguments(checkpoints, name="qwen2"):
    return ["--model", str(checkpoints / name), "--data", str(checkpoints / "sums.jsonl"), *FLAGS]


@pytest.fixture
def command(checkpoints, tmp_path, monkeypatch):
    """The arguments of a short run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grpo, "grade", chance)
    monkeypatch.setattr(grpo, "hub_is_reachable", lambda: False)
    return arguments(checkpoints)


@pytest.fixture(scope="session")
def undisturbed(checkpoints, tmp_path_factory):
    """Whole runs in float32 and bfloat16: their folders by type, and what the first showed on the screen."""
    root, screen = tmp_path_factory.mktemp("undisturbed"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(screen):
        patch.setattr(grpo, "grade", chance)
        for dtype in ("bfloat16", "float32"):
            screen.truncate(screen.seek(0))
            assert grpo.main([*arguments(checkpoints), "--dtype", dtype, "--output_dir", str(root / dtype)]) == 0
    return {"bfloat16": root / "bfloat16", "float32": root / "float32", "screen": screen.getvalue()}


def rows(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def assert_same_run(one, other):
    for name in ("metrics", "evaluations", "samples"):
        first, second = ([{key: value for key, value in row.items() if key not in CLOCK}
                          for row in rows(Path(run, f"{name}.jsonl"))] for run in (one, other))
        assert first == second, name
    for name in ("final", "best"):
        weights = [Path(run, name, "model.safetensors").read_bytes() for run in (one, other)]
        assert weights[0] == weights[1], name


def start(argv, limit=None):
    """Run the command in a forked child -> its process number. `limit`: of file sizes, as a full disk has it."""
    pid = os.fork()
    if pid == 0:
        status = 99
        torch.set_num_threads(1)  # after a fork torch renews its pool, and fails if two threads are the first to ask
        try:
            sys.stdout = sys.stderr = open(f"child-{os.getpid()}.log", "w", encoding="utf-8")
            if limit:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            status = grpo.main(argv)
        finally:
            with contextlib.suppress(OSError):  # its own log may be full too
                sys.stdout.flush()
            os._exit(status)
    return pid


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def one_sentence(capsys, kind="stopped"):
    shown = re.split(r"[\r\n]+", capsys.readouterr().err)
    error, *more = [line for line in shown if line.strip() and not line.startswith("GRPO:")]  # the progress bar
    assert error.startswith(f"grpo.py: {kind}: ") and not more, shown
    return error


def copy_of(run, unfinished=True):
    """A copy of a run, named "run", that has only its last evaluation to do."""
    shutil.copytree(run, "run")
    if unfinished:
        Path("run/summary.json").unlink()
        shutil.rmtree("run/final")
    return ["--resume", "--output_dir", "run"]


# --- a run


def test_what_a_run_leaves(undisturbed, checkpoints):
    run = undisturbed["float32"]
    facts, metrics, evaluations = (json.loads((run / "summary.json").read_text()), rows(run / "metrics.jsonl"),
                                   rows(run / "evaluations.jsonl"))
    assert facts["seconds"] > 0
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6] and metrics[-1]["kl"] > 0
    assert abs(metrics[0]["ratio"] - 1) < 0.2 and metrics[0]["sampler_gap"] < 1e-4 and metrics[0]["kl"] >= 0
    assert [e["step"] for e in evaluations] == [0, 3, 6] and evaluations[-1].items() >= facts["after"].items()
    assert facts["before"].items() <= evaluations[0].items()
    assert all(row.keys() >= {"question", "answer", "completion", "outcome"} for row in rows(run / "samples.jsonl"))
    assert facts["best"]["step"] == max(evaluations, key=lambda e: e["pass_at_1"])["step"] == 3
    base = AutoModelForCausalLM.from_pretrained(checkpoints / "qwen2").state_dict()
    for name in ("final", "best"):
        trained = AutoModelForCausalLM.from_pretrained(run / name).state_dict()
        assert any(not torch.equal(base[key], trained[key]) for key in base)
        assert AutoTokenizer.from_pretrained(run / name).eos_token == "<|end|>"


def test_what_a_run_shows(undisturbed):
    lines = undisturbed["screen"].splitlines()
    assert "R1-Zero" in lines[0] and lines[-1].startswith("wrote ")
    (titles,) = [i for i, line in enumerate(lines) if line.startswith(" step reward")]
    steps = [line for line in lines if re.match(r" +[1-6] +-?\d", line)]
    assert len(steps) == 6 and all(len(line) == len(lines[titles]) <= 80 for line in steps)
    assert all(f"{title}:" in " ".join(lines[titles - 4 : titles]) for title in ("reward", "flat", "again", "entropy"))
    assert re.match(r"right on held-out problems: \d+% before, \d+% after", lines[-2])
    assert re.match(r"entropy +[▁-█]+ \d[.\d]{,5} -> \d[.\d]{,5}$", lines[-3])
    told = undisturbed["screen"]
    assert "27 problems to train on, 2 to evaluate on" in told and "'QWhat is" in told and "'<|end|>'" in told


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_every_architecture_trains(name, command, checkpoints):
    assert grpo.main([*arguments(checkpoints, name), "--steps", "1", "--output_dir", "run"]) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (checkpoints / name, "run/final"))
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_the_command_as_a_user_types_it_on_an_old_terminal(command):
    done = subprocess.run([sys.executable, grpo.__file__, *command, "--steps", "1"], capture_output=True, text=True,
                          timeout=200, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "wrote runs/zero/" in done.stdout and "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_two_runs_started_together_get_two_folders_and_equal_each_other(command, undisturbed):
    assert [status_of(child) for child in [start(command) for _ in range(2)]] == [0, 0]
    assert sorted(path.name for path in Path("runs").iterdir()) == ["zero", "zero-2"]
    for path in Path("runs").iterdir():
        assert_same_run(undisturbed["float32"], path)


def test_evaluation_keeps_its_samples(command):
    assert grpo.main([*command, "--stage", "eval"]) == 0
    facts, samples = json.loads(Path("runs/eval/summary.json").read_text()), rows("runs/eval/samples.jsonl")
    assert facts["before"]["problems"] == 2 and len(samples) == 4
    right = [row["outcome"] == "right" for row in samples]
    assert facts["before"]["pass_at_1"] == sum(right) / 4
    assert all(chance(row["completion"], None)[1] == row["outcome"] and row["question"] for row in samples)
    assert facts["before"].items() <= rows("runs/eval/evaluations.jsonl")[0].items()


# --- stopped and killed


@pytest.mark.parametrize("signum, dtype, times", [
    (signal.SIGINT, "bfloat16", 1), (signal.SIGTERM, "float32", 1), (signal.SIGINT, "float32", 2)])
def test_a_stopped_run_says_how_to_go_on_as_if_nothing_had_happened(
    signum, dtype, times, command, undisturbed, monkeypatch, capsys
):
    calls, plain = [], grpo.score

    def interrupting(*args):
        calls.append(args)
        for _ in range(times if len(calls) == 4 else 0):
            os.kill(os.getpid(), signum)
        return plain(*args)

    monkeypatch.setattr(grpo, "score", interrupting)
    assert grpo.main([*command, "--dtype", dtype, "--output_dir", "parts"]) == 128 + signum
    assert len(rows("parts/metrics.jsonl")) == (4 if times == 1 else 3)  # of the step, or at once
    assert not Path("parts/summary.json").exists()
    again = capsys.readouterr().err.splitlines()[-1].partition("go on with: python grpo.py ")[2]
    assert grpo.main(shlex.split(again)) == 0
    assert_same_run(undisturbed[dtype], "parts")


def test_a_stop_in_pre_training_says_what_is_true(command, monkeypatch, capsys):
    def pretrain(*_):
        if not told:
            raise KeyboardInterrupt

    told = ""
    monkeypatch.setattr(grpo, "pretrain", pretrain)
    small = [*command[2:], "--model", "tinier", "--steps", "1", "--template", "User: {question} Assistant:"]
    assert grpo.main(small) == 130
    told = capsys.readouterr().err.splitlines()[-1].partition("go on with: python grpo.py ")[2]
    assert grpo.main(shlex.split(told)) == 0
    assert "starts again" in capsys.readouterr().out and Path("runs/zero/final").exists()


def test_a_live_run_is_refused_and_a_killed_one_taken_over(command, undisturbed, monkeypatch, capsys):
    plain, parent = grpo.score, os.getpid()

    def sleeping(*args):
        while os.getpid() != parent and Path("parts/metrics.jsonl").exists() and len(rows("parts/metrics.jsonl")) == 3:
            Path("asleep").touch()
            time.sleep(0.01)
        return plain(*args)

    monkeypatch.setattr(grpo, "score", sleeping)
    pid = start([*command, "--output_dir", "parts"])
    while not Path("asleep").exists():
        time.sleep(0.01)
    assert grpo.main(["--resume", "--output_dir", "parts"]) == 2
    assert "parts is in use" in one_sentence(capsys, "error")
    os.kill(pid, signal.SIGKILL)
    assert status_of(pid) == -signal.SIGKILL
    assert grpo.main(["--resume", "--output_dir", "parts"]) == 0
    assert_same_run(undisturbed["float32"], "parts")


@pytest.mark.parametrize("seed", range(6))
def test_a_run_killed_at_any_moment_goes_on_as_if_nothing_had_happened(seed, command, undisturbed, monkeypatch):
    """With odd seeds inside a save, in one of its steps; otherwise anywhere."""
    dtype, rng = ("float32", "bfloat16")[seed // 2 % 2], random.Random(seed)
    command += ["--dtype", dtype, "--output_dir", "parts"]
    dies_at, calls, places = rng.randrange(4, 40), [], [(grpo, "grade"), (grpo, "update_policy"), (grpo.Run, "log")]
    if seed % 2:
        places = [(os, "replace"), (shutil, "rmtree"), (torch, "save"), (PreTrainedModel, "save_pretrained")]
        dies_at = rng.randrange(3, 16)

    def deadly(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for place, name in places:
            patch.setattr(place, name, deadly(getattr(place, name)))
        assert status_of(start(command)) == -signal.SIGKILL
    assert grpo.main([*command, "--resume"]) == 0
    assert_same_run(undisturbed[dtype], "parts")
    assert not [*Path("parts").rglob("writing-*")]  # half a checkpoint is no souvenir


# --- a full disk, damaged files


@pytest.mark.parametrize("full", ["step-000004", "final", "best"])
def test_a_disk_that_is_full_while_saving_costs_nothing(full, command, undisturbed, monkeypatch, capsys):
    def save_pretrained(model, folder, **settings):
        if full in str(folder):
            Path(folder).mkdir(parents=True)
            Path(folder, "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return plain(model, folder, **settings)

    plain = PreTrainedModel.save_pretrained
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)
        assert grpo.main([*command, "--output_dir", "parts"]) == 1
    error = one_sentence(capsys)
    assert full in error and "No space" in error and "--resume" in error
    assert not [path for path in Path("parts").rglob("*") if path.is_dir() and full in path.name]
    assert grpo.main(["--resume", "--output_dir", "parts"]) == 0
    assert_same_run(undisturbed["float32"], "parts")


@pytest.mark.parametrize("limit", [100, 2_000, 40_000])
def test_a_file_that_cannot_grow_is_one_sentence(limit, command):
    """The settings, a log, a checkpoint: whatever meets the end of the disk first."""
    pid = start([*command, "--steps", "1", "--output_dir", "run"], limit)
    assert status_of(pid) == 1
    log = Path(f"child-{pid}.log").read_text("utf-8")
    assert "Traceback" not in log and (limit < 500 or "grpo.py: stopped: " in log)
    resume = ["--resume"] if Path("run/config.json").exists() else []
    assert grpo.main([*command, "--steps", "1", "--output_dir", "run", *resume]) == 0


@pytest.mark.parametrize("file, harm", [
    ("model.safetensors", "flip"), ("state.pt", "truncate"), ("files.json", "truncate"), ("config.json", "remove"),
    ("everything", "truncate")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(file, harm, command, undisturbed, capsys):
    again = copy_of(undisturbed["float32"])
    name = "state.pt" if file == "everything" else file
    for path in Path("run/checkpoint").glob(f"*/{name}" if file == "everything" else f"step-000006/{name}"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.unlink() if harm == "remove" else path.write_bytes(data if harm == "flip" else data[: len(data) // 2])
    assert grpo.main(again) == 0
    printed = capsys.readouterr().out
    assert "step-000006 is damaged" in printed
    assert ("starts again" in printed) == ("step-000004 is damaged" in printed) == (file == "everything")
    assert_same_run(undisturbed["float32"], "run")


def test_a_torn_line_of_a_log_is_no_end(command, undisturbed):
    again = copy_of(undisturbed["float32"])
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 7, "rew')  # after the last checkpoint: it is done again
    assert grpo.main(again) == 0
    assert_same_run(undisturbed["float32"], "run")
    Path("run/summary.json").unlink()
    os.truncate("run/metrics.jsonl", Path("run/metrics.jsonl").stat().st_size - 9)  # before it: a damaged disk
    assert grpo.main(again) == 0
    assert_same_run(undisturbed["float32"], "run")


@pytest.mark.parametrize("text, told", [
    ("{", "damaged"), ("[1]", "damaged"), ("", "damaged"), ('{"stage": "zero", "future": 1}', "future"),
    ('{"model": 5}', "")])
def test_settings_that_are_damaged_or_foreign_are_one_sentence(text, told, command, undisturbed, capsys):
    again = copy_of(undisturbed["float32"])
    Path("run/config.json").write_text(text)
    assert grpo.main(again) == 2
    assert told in one_sentence(capsys, "error") and len(rows("run/metrics.jsonl")) == 6


def test_a_model_that_cannot_be_used_is_one_sentence(command, undisturbed, capsys):
    copy_of(undisturbed["float32"], unfinished=False)
    os.truncate("run/final/model.safetensors", 5000)
    for model, told in (("run/final", "run/final"), ("run", "run/final"), ("nowhere", "nowhere")):
        assert grpo.main([*command, "--model", model]) == 2
        assert told in one_sentence(capsys, "error")
    for tokens in (505, 10**12):
        assert grpo.main([*command, "--max_completion_tokens", str(tokens)]) == 2
        assert re.search(rf"max_completion_tokens is {tokens}.* 512 ", one_sentence(capsys, "error"))
    assert not [*Path("runs").iterdir()]  # a command that was refused leaves no folder behind


def test_a_finished_run_is_left_as_it_is_and_other_settings_are_another_run(command, undisturbed, capsys):
    again = copy_of(undisturbed["float32"], unfinished=False)
    state = lambda: {path: path.read_bytes() for path in Path("run").rglob("*") if path.suffix != ""}  # noqa: E731
    files = state()
    assert grpo.main(again) == 0 and "run is finished" in capsys.readouterr().out
    for flags, told in ((["--clip_eps", "0.3", "--seed", "1"], ("clip_eps was 0.2 and is 0.3", "seed was 3 and is 1")),
                        (["--model", "nowhere"], ("model was",))):
        assert grpo.main([*again, *flags]) == 2
        error = one_sentence(capsys, "error")
        assert all(words in error for words in told)
    assert grpo.main([*command, "--output_dir", "run"]) == 2
    assert "--resume" in one_sentence(capsys, "error")
    assert files == state()
    assert grpo.main([*again, "--steps", "7", "--save_every", "1"]) == 0
    assert [m["step"] for m in rows("run/metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


# --- what looks wrong


def test_updates_that_are_not_finite_are_left_out(command, monkeypatch):
    plain, plain_score, step, bad_steps = grpo.grpo_loss, grpo.score, [], {2, 3, 4}

    def loss(*args, **kwargs):
        value, sums = plain(*args, **kwargs)
        return value * (float("nan") if len(step) in bad_steps else 1.0), sums

    monkeypatch.setattr(grpo, "grpo_loss", loss)
    monkeypatch.setattr(grpo, "score", lambda *args: (step.append(1), plain_score(*args))[1])
    assert grpo.main([*command, "--output_dir", "run"]) == 0
    assert {m["step"] for m in rows("run/metrics.jsonl") if m["grad_norm"] is None} == bad_steps
    final = AutoModelForCausalLM.from_pretrained("run/final").state_dict()
    assert all(torch.isfinite(weight).all() for weight in final.values())


def test_a_run_whose_numbers_were_not_all_finite_still_ends(tmp_path, capsys):
    run = grpo.Run(grpo.make_config(output_dir=str(tmp_path / "run")))
    run.log("metrics.jsonl", dict(accuracy=0.5, mean_tokens=3.0, reflection=0.0, entropy=float("nan")))
    assert rows(run.folder / "metrics.jsonl")[0]["entropy"] is None
    run.facts.update(before=dict(pass_at_1=0.5), after=dict(pass_at_1=1.0))
    run.finish()
    assert "50% before, 100% after" in capsys.readouterr().out and (tmp_path / "run" / "summary.json").exists()


HEALTHY = dict(accuracy=0.5, truncated=0.1, flat_groups=0.3, clipped=0.01, kl=0.01, entropy=0.3, ratio=1.0,
               sampler_gap=1e-6, grad_norm=0.5, outcomes={"right": 3, "wrong": 2})


@pytest.mark.parametrize("change, words", [
    ({}, ""), (dict(flat_groups=1.0, accuracy=0.97), ""), (dict(entropy=0.001, accuracy=0.97), ""),  # solved, not sick
    (dict(truncated=0.92), "max_completion_tokens"), (dict(flat_groups=0.9), "flat"),
    (dict(clipped=0.5), "learning_rate"), (dict(entropy=3.0), "explodes"),
    (dict(entropy=0.001), "collapsed"), (dict(accuracy=0.1), "fallen"), (dict(sampler_gap=0.5), "disagree"),
    (dict(grad_norm=None, entropy=None), "not finite"), (dict(outcomes={"right": 3, "unparsable": 2}), "not be read")])
def test_the_doctor_names_what_is_wrong(change, words):
    found = grpo.doctor([HEALTHY] * 5 + [{**HEALTHY, **change}] * 5)
    assert [words in sentence for sentence in found] == [True] * bool(words)


def test_a_sparkline_runs_from_the_lowest_to_the_highest_value():
    assert [grpo.sparkline(values) for values in ([0, 1, 2, 3], [5.0] * 3)] == ["▁▃▆█", "▁▁▁"]
    assert len(grpo.sparkline(list(range(1000)))) == 50
