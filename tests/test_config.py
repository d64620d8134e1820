"""Settings, command line, problems and prompts. Oracles: tables of what the user types and of what is wrong with it; a
web server of our own; the words of the paper's Table 1."""

import copy
import dataclasses
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import grpo
from grpo import Config, InputError, load_problems, make_config, parse_args, read_problems

FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def kind_of(name):
    """The plain type of a setting, without None."""
    hint = get_type_hints(Config)[name]
    return str if get_origin(hint) is Literal else next(k for k in (*get_args(hint), hint) if k is not type(None))


# --- settings


def test_every_setting_is_a_flag_that_is_explained_and_checked(capsys):
    for name, field in FIELDS.items():
        assert len(field.metadata["help"]) > 3, name
        if name == "resume":  # reads the settings of a run first; see test_run
            continue
        if kind_of(name) is bool:
            assert getattr(parse_args([f"--{name}"]), name) and not getattr(parse_args([f"--no-{name}"]), name)
            continue
        if field.default is not None:
            assert getattr(parse_args([f"--{name}", str(field.default)]), name) == field.default
        bad = ["x", "nan", "inf"] * (kind_of(name) is float) + ["x", "2.5", "-1"] * (kind_of(name) is int)
        for value in bad + ["other"] * (get_origin(get_type_hints(Config)[name]) is Literal):
            assert grpo.main([f"--{name}", value]) == 2, (name, value)
            error = capsys.readouterr().err
            assert error.startswith("grpo.py: error: ") and error.count("\n") == 1 and name in error and value in error


LIMITS = {  # what is just allowed, and what is not any more
    "group_size": (2, 1), "steps": (1, 0), "prompts_per_step": (1, 0), "max_completion_tokens": (1, 0),
    "micro_batch_tokens": (1, 0), "save_every": (1, 0), "sft_epochs": (1, 0), "sft_batch_size": (1, 0),
    "rejection_samples": (1, 0), "eval_problems": (1, 0), "eval_samples": (1, 0), "updates_per_rollout": (1, 0),
    "max_rows": (0, -1), "seed": (0, -1), "ref_every": (0, -1), "eval_every": (0, -1), "sample_every": (0, -1),
    "kl_coef": (0.0, -0.1), "format_weight": (0.0, -1.0), "language_weight": (0.0, -1.0),
    "eval_temperature": (0.0, -1.0), "temperature": (0.1, 0.0), "learning_rate": (1e-9, 0.0), "clip_eps": (10.0, 0.0),
    "clip_eps_high": (0.0, -0.1), "sft_learning_rate": (1.0, 0.0),
    "template": ("{question}", "question")}


def test_every_limit_lies_where_it_should():
    for name, (good, bad) in LIMITS.items():
        assert getattr(make_config("x", **{name: good}), name) == good
        with pytest.raises(InputError, match=rf"^{name} is {bad!r}; it must be \w"):
            make_config("x", **{name: bad})
    numbers = {name for name in FIELDS if kind_of(name) in (int, float)} - {"preference_steps"}
    assert numbers <= LIMITS.keys()  # a new setting must come here too


@pytest.mark.parametrize("settings, told", [
    (dict(loss_average="mean"), "one of sequence, token, constant"), (dict(stage="r1"), "cold_start is None"),
    (dict(stage="r1", cold_start="a"), "general_data is None"), (dict(stage="distill"), "teacher is None"),
    (dict(preference_steps=1), "general_data is None"), (dict(preference_steps=-1), "preference_steps is -1"),
    (dict(preference_steps=1, general_data="a"), "reward_model is None"),
])
def test_settings_that_do_not_go_together(settings, told):
    with pytest.raises(InputError, match=told):
        make_config("x", **settings)


@pytest.mark.parametrize("line", [
    "--bogus 3", "--prompts 3", "stray", "--learning_rate", "--model", "--no-steps", "--compile yes", "--dtype float16",
    "--output-dir x", "--resume --output_dir nowhere", "--data nowhere.jsonl", "--device gpu --data {sums}"])
def test_bad_input_is_one_line_and_leaves_no_folder(line, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert grpo.main(line.format(sums=checkpoints / "sums.jsonl").split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("grpo.py: error: ") and error.count("\n") == 1 and "usage" not in error
    assert any(word.lstrip("-") in error for word in line.split())
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or path.parent.name == "runs"]


def test_the_model_chooses_the_preset_and_every_value_of_it_can_be_overridden(tmp_path):
    tiny, large = parse_args([]), parse_args(["--model=Qwen/Qwen2.5-0.5B", "--data=math500"])
    assert dataclasses.asdict(tiny) == {**dataclasses.asdict(Config()), **grpo.TINY}
    assert large == Config(model="Qwen/Qwen2.5-0.5B", data="math500") and tiny == make_config()
    for name, value in grpo.TINY.items():
        other = {"template": "Q {question}", "data": "x", "kl_coef": 0.5}.get(name, value * 2)
        flag = [f"--{name}", str(other)]
        if isinstance(value, bool):
            other, flag = not value, [f"--{name}" if not value else f"--no-{name}"]
        assert getattr(parse_args(flag), name) == getattr(make_config(**{name: other}), name) == other
    for extra, preset in (({}, Config()), ({"embedded_world": 1}, tiny)):  # a folder trained from it
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **extra}))
        assert make_config(str(tmp_path)).learning_rate == preset.learning_rate


def test_help_names_each_setting_once_in_groups_with_the_defaults_of_the_model(capsys):
    done = subprocess.run([sys.executable, grpo.__file__, "--help"], capture_output=True, timeout=100, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})  # an old terminal
    assert done.returncode == 0 and not done.stderr and done.stdout.isascii()
    with pytest.raises(SystemExit):
        grpo.main(["--help", "--model", "Qwen/Qwen2.5-0.5B"])
    for text in (done.stdout, capsys.readouterr().out):
        lines = text.splitlines()
        assert len(lines) <= 140 and max(map(len, lines)) <= 90  # on a terminal of 80 columns
        assert sorted(re.findall(r"^  --(\w+)", text, re.M)) == sorted([*FIELDS])
        groups = re.findall(r"^(\w.*):$", text, re.M)
        assert len(groups) >= 9 and {"GRPO", "sampling", "rewards", "evaluation"} <= {*groups}
        assert text[: text.index("\n  --")].count("  python grpo.py") == 5  # examples, before the flags
        assert all(choice in text for choice in ("distill", "float32", "constant"))
        told = re.search(r"^  --steps\s.*?\n  --", text, re.M | re.S)[0]
        assert "[200]" in told and str(grpo.TINY["steps"]) in told


# --- problem files

GOOD = '{"question": "q", "answer": "1"}'


def write(folder, *lines, name="problems.jsonl"):
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("field, line", [
    ("", "{"), ("", "hello"), ("", "[1]"), ("", "3"), ("", "[" * 10**5), ("question", '{"answer": "1"}'),
    *(("question", f'{{"question": {value}, "answer": "1"}}') for value in ("3", '""', "null", '["q"]')),
    *(("answer", f'{{"question": "q", "answer": {value}}}') for value in ("null", "true", '["1"]')),
    *(("tests", f'{{"question": "q", "tests": {value}}}')
      for value in ('"assert f(1)"', "5", "[3]", '["assert f(1)", {}]', '{"a": "1"}')),
    *(("numbers", f'{{"question": "q", "answer": "1", "numbers": {value}}}') for value in ("5", '["x"]', "[1.5]")),
    ("completion", '{"question": "q", "completion": 3}'),
    ("rejected", '{"question": "q", "task": "helpful", "completion": "a", "rejected": ["b"]}')])
def test_a_bad_line_and_its_field_are_named(field, line, tmp_path):
    path = write(tmp_path, GOOD, "", line)
    with pytest.raises(InputError) as error:
        read_problems(path)
    told = str(error.value)
    assert told.startswith(f"{path} line 3: ") and field in told and len(told) < 400 and "\n" not in told


@pytest.mark.parametrize("field", ("question", "answer", "completion", ""))
def test_a_huge_line_is_refused_at_once(field, tmp_path):
    row = {"question": "q", "answer": "1", "completion": "c", **({field: "9" * 20_000_000} if field else {})}
    path = write(tmp_path, json.dumps(row) if field else "9" * 20_000_000)
    began = time.process_time()
    with pytest.raises(InputError) as error:
        read_problems(path)
    assert time.process_time() - began < 3 and len(str(error.value)) < 400 and field in str(error.value)


def test_a_file_without_problems_or_without_utf8_is_named(tmp_path):
    with pytest.raises(InputError, match="problems.jsonl.* too few rows"):
        load_problems(write(tmp_path, "", "  "), whole=True)
    (tmp_path / "latin.jsonl").write_bytes('{"question": "é", "answer": "1"}'.encode("latin-1"))
    with pytest.raises(InputError, match="latin.jsonl is not UTF-8 text"):
        read_problems(str(tmp_path / "latin.jsonl"))


ASSERT = "assert f(1) == 2"


@pytest.mark.parametrize("row, expected", [
    ({"question": "q", "answer": "7"}, ("q", "7", "math", (), ())),
    ({"question": "q", "answer": 7}, ("q", "7", "math", (), ())),
    ({"problem": "p", "answer": "\\frac{1}{2}", "level": 3}, ("p", "\\frac{1}{2}", "math", (), ())),
    ({"question": "q", "answer": "3 + 4 = 7 so\n#### 7"}, ("q", "7", "math", (), ())),
    ({"question": "q", "answer": "24", "numbers": [1, 2, 12]}, ("q", "24", "countdown", (1, 2, 12), ())),
    ({"question": "q", "tests": [ASSERT]}, ("q", "", "code", (), (ASSERT,))),
    ({"question": "q", "answer": "x", "tests": [ASSERT] * 2}, ("q", "x", "code", (), (ASSERT,) * 2)),
    ({"question": "a\u2028b\u0085c", "answer": "天"}, ("a\u2028b\u0085c", "天", "math", (), ())),
    ({"question": "q", "task": "helpful"}, ("q", "", "helpful", (), ())),
    ({"question": "q", "completion": "c"}, ("q", "", "math", (), (), "c", "")),
    ({"question": "q", "task": "harmless", "completion": "c", "rejected": "r"},
     ("q", "", "harmless", (), (), "c", "r"))])
def test_a_good_line_is_read_and_what_is_written_is_read_back(row, expected, tmp_path):
    problems = read_problems(write(tmp_path, "\ufeff" + json.dumps(row, ensure_ascii=False)))
    assert dataclasses.astuple(problems[0])[: len(expected)] == expected
    assert read_problems(grpo.write_problems(tmp_path / "again.jsonl", problems)) == problems
    assert len([*tmp_path.iterdir()]) == 2  # no temporary file stays


def test_half_a_character_can_be_written_and_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path, problems = tmp_path / "x.jsonl", [grpo.Problem("\ud83d is half a face", "7")]
    grpo.write_problems(path, problems)
    monkeypatch.setattr(grpo.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        grpo.write_problems(path, problems * 2)
    assert read_problems(path) == problems


def test_a_tenth_of_a_file_is_held_out_by_question(tmp_path):
    rows = [json.dumps({"question": f"q {i % 150}", "answer": "1"}) for i in range(300)]  # every question twice
    path, backwards = write(tmp_path, *rows), write(tmp_path, *rows[::-1], name="backwards.jsonl")
    training, held_out = ({p.question for p in load_problems(path, part)} for part in (False, True))
    assert 5 <= len(held_out) <= 25 and len(training | held_out) == 150 and not training & held_out
    assert {p.question for p in load_problems(backwards, True)} == held_out  # whatever the order
    parts = [len(load_problems(path, part)) for part in (False, True)]
    assert sum(parts) == len(load_problems(path, whole=True)) == 300
    with pytest.raises(InputError, match="too few rows to hold some out; give --eval_data"):
        [load_problems(write(tmp_path, GOOD), part) for part in (False, True)]


def test_another_order_of_the_numbers_is_on_the_same_side(tmp_path):
    sides = [{tuple(sorted(p.numbers)) + (p.answer,) for p in grpo.calculator_problems(part)} for part in (0, 1)]
    assert len(sides[0]) > 5 * len(sides[1]) > 300 and not sides[0] & sides[1]


def data_config(path, **settings):
    return make_config("x", data=path, **settings)


def test_no_problem_is_trained_and_evaluated_on_and_bad_references_are_counted(tmp_path, capsys):
    rows = [json.dumps({"question": f"q {i}", "answer": str(i)}) for i in range(60)]
    bad = [json.dumps({"question": f"bad {i}", "answer": "9" * 400 * (i % 2)}) for i in range(7)]  # "": no answer
    other = write(tmp_path, *rows[50:], name="other.jsonl")
    problems, held_out = grpo.load_data(data_config(write(tmp_path, *rows, *bad), eval_data=other))
    assert {p.question for p in problems} == {f"q {i}" for i in range(50)} and len(held_out) == 10
    assert re.search(r"50 problems to train on, 10 to evaluate on; 17 ", capsys.readouterr().out)
    with pytest.raises(InputError, match="data"):
        grpo.load_data(data_config(other, eval_data=other))
    with pytest.raises(InputError, match="sft .*completion"):
        grpo.load_data(data_config(other, eval_data=other, stage="sft"))
    plain = write(tmp_path, *(json.dumps({"question": f"q {i}", "completion": "7"}) for i in range(90)), name="plain")
    with pytest.raises(InputError, match="usable"):  # without references there is nothing to evaluate on
        grpo.load_data(data_config(plain, stage="sft"))
    assert len(grpo.load_data(data_config(plain, stage="sft", eval_data=other))[0]) == 80


# --- data by name


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A web server on this machine with both data sets, and an empty cache; -> the paths that were asked for."""
    lines = lambda name, count, key: "".join(  # noqa: E731
        json.dumps({key: f"{name} {i}", "answer": f"so\n#### {i}"}) + "\n" for i in range(count))
    files = {"/train.jsonl": lines("train", 5, "question"), "/test.jsonl": lines("test", 3, "question"),
             "/math.jsonl": lines("math", 60, "problem")}
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = files.get(self.path, "").encode()
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        log_message = lambda *_: None  # noqa: E731

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        base = f"http://127.0.0.1:{web.server_address[1]}"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(grpo, "GSM8K", base + "/%s.jsonl")
        monkeypatch.setattr(grpo, "MATH500", base + "/math.jsonl")
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
        yield asked
        web.shutdown()


def test_gsm8k_and_math500_are_fetched_once(server, tmp_path, monkeypatch):
    for _ in range(2):
        assert [p.question for p in load_problems("gsm8k")] == [f"train {i}" for i in range(5)]
        assert [p.answer for p in load_problems("gsm8k", True)] == ["0", "1", "2"]  # its own test set
        sides = [{p.question for p in load_problems("math500", part)} for part in (False, True)]
        assert len(sides[0] | sides[1]) == len(load_problems("math500", True, whole=True)) == 60 and all(sides)
    assert sorted(server) == ["/math.jsonl", "/test.jsonl", "/train.jsonl"]
    before = [*tmp_path.rglob("*")]
    monkeypatch.setattr(grpo, "MATH500", grpo.MATH500.replace("math", "missing"))
    with pytest.raises(InputError) as error:
        load_problems("math500")
    assert grpo.MATH500 in str(error.value) and "--data PATH.jsonl" in str(error.value)
    assert [*tmp_path.rglob("*")] == before


# --- prompts

TABLE_1 = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>. User: What is {1} + 2?. Assistant:")


def test_the_template_is_the_papers_and_the_chat_template_comes_only_when_asked_for(tokenizer):
    assert grpo.render_prompt(tokenizer, "What is {1} + 2?", Config()) == TABLE_1
    with pytest.raises(InputError, match="the tokenizer has none"):
        grpo.render_prompt(tokenizer, "q", Config(chat_template=True))
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = ("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
                               "{% if add_generation_prompt %}[assistant] {% endif %}")
    assert grpo.render_prompt(tokenizer, "q", Config(template="Q: {question}")) == "Q: q"
    assert grpo.render_prompt(tokenizer, "q", Config(chat_template=True)) == "[user] q\n[assistant] "


def test_the_beginning_token_comes_once(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    assert grpo.encode_prompt(tokenizer, "x") == tokenizer("x")["input_ids"]  # a tokenizer that has none
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    ids = grpo.encode_prompt(tokenizer, "x")
    assert ids[0] == begin and ids.count(begin) == 1 and grpo.encode_prompt(tokenizer, "<|begin|>x") == ids
