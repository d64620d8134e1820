"""Settings, command line, problems and prompts. Oracles: tables of what the user types and the one line that answers it;
a web server of our own; the words of the paper's Table 1."""

import copy
import dataclasses
import http.server
import json
import random
import re
import threading
from fractions import Fraction

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import grpo
from grpo import Config, InputError, countdown_problems, load_problems, make_config, parse_args, read_problems

# --- settings and command line


@pytest.mark.parametrize(
    "line, message",
    [
        (
            "--group_size 1",
            "group_size is 1; it must be at least 2: an advantage compares completions of one prompt",
        ),
        ("--steps 0", "steps is 0; it must be at least 1"),
        ("--prompts_per_step 0", "prompts_per_step is 0; it must be at least 1"),
        ("--max_rows 0", "max_rows is 0; it must be at least 1"),
        ("--micro_batch_tokens -5", "micro_batch_tokens is -5; it must be at least 1"),
        ("--seed -1", "seed is -1; it must be at least 0"),
        ("--kl_coef -0.1", "kl_coef is -0.1; it must be at least 0"),
        ("--kl_coef nan", "kl_coef is nan; it must be a finite number"),
        ("--kl_coef inf", "kl_coef is inf; it must be a finite number"),
        ("--temperature 0", "temperature is 0.0; it must be above 0"),
        ("--temperature nan", "temperature is nan; it must be a finite number"),
        ("--learning_rate 0", "learning_rate is 0.0; it must be above 0"),
        ("--clip_eps -1", "clip_eps is -1.0; it must be above 0"),
        ("--clip_eps_high 0", "clip_eps_high is 0.0; it must be above 0"),
        ("--eval_temperature -1", "eval_temperature is -1.0; it must be at least 0"),
        ("--eval_top_p 0", "eval_top_p is 0.0; it must be above 0 and at most 1"),
        ("--eval_top_p 1.5", "eval_top_p is 1.5; it must be above 0 and at most 1"),
        (
            "--template hello",
            "template is 'hello'; it must be a text with {question} where the question goes",
        ),
        (
            "--prompts_per_step 3 --group_size 3 --updates_per_rollout 2",
            "updates_per_rollout is 2; it must divide the 9 "
            "completions of a step (prompts_per_step x group_size)",
        ),
        (
            "--max_rows 4 --group_size 8 --eval_samples 2",
            "max_rows is 4; it must be at least 8, to hold one group",
        ),
        (
            "--max_rows 4 --group_size 2 --eval_samples 6",
            "max_rows is 4; it must be at least 6, to hold one group",
        ),
        ("--bogus 3", "--bogus is not a setting; python grpo.py --help explains every setting"),
        (
            "--prompts 3",
            "--prompts is not a setting; python grpo.py --help explains every setting",
        ),  # no abbreviations
        ("stray", "stray is not a setting; python grpo.py --help explains every setting"),
    ],
)
def test_a_bad_value_is_answered_with_one_line(line, message, capsys):
    with pytest.raises(InputError) as error:
        parse_args(line.split())
    assert str(error.value) == message
    assert grpo.main(line.split()) == 2
    assert capsys.readouterr() == ("", f"grpo.py: error: {message}\n")


@pytest.mark.parametrize(
    "line, name, value",
    [
        ("--group_size x", "--group_size", "invalid int value: 'x'"),
        ("--steps 2.5", "--steps", "invalid int value: '2.5'"),
        ("--temperature hot", "--temperature", "invalid float value: 'hot'"),
        ("--learning_rate", "--learning_rate", "expected one"),
        ("--stage foo", "--stage", "invalid choice: 'foo'"),
        ("--dtype float16", "--dtype", "invalid choice: 'float16'"),
        ("--loss_average mean", "--loss_average", "invalid choice: 'mean'"),
        ("--model", "--model", "expected one argument"),
    ],
)
def test_what_the_parser_refuses_is_one_line_too(line, name, value, capsys):
    assert grpo.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and name in err and value in err and "usage" not in err


def test_the_model_chooses_the_preset():
    tiny, large = parse_args([]), parse_args(["--model", "Qwen/Qwen2.5-0.5B"])
    assert dataclasses.asdict(tiny) == {**dataclasses.asdict(Config()), **grpo.TINY}
    assert large == Config(model="Qwen/Qwen2.5-0.5B")
    assert parse_args(["--model=Qwen/Qwen2.5-0.5B", "--data=gsm8k"]) == Config(
        model="Qwen/Qwen2.5-0.5B", data="gsm8k"
    )
    assert (tiny, large) == (make_config(), make_config("Qwen/Qwen2.5-0.5B"))
    assert tiny.template != large.template and tiny.learning_rate != large.learning_rate


def test_a_folder_trained_from_the_embedded_model_has_its_preset(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert make_config(str(tmp_path)).learning_rate == Config().learning_rate
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "embedded_world": 1}))
    assert make_config(str(tmp_path)).learning_rate == grpo.TINY["learning_rate"]


@pytest.mark.parametrize("model", ("tiny", "Qwen/Qwen2.5-0.5B"))
def test_every_preset_value_can_be_overridden(model):
    for name, value in grpo.TINY.items():
        other = {
            "template": "Q {question}",
            "prompts_per_step": 4,
            "group_size": 4,
            "gradient_checkpointing": True,
            "kl_coef": 0.5,
        }.get(name, value * 2)
        assert getattr(parse_args(["--model", model, f"--{name}", str(other)]), name) == other
        assert getattr(make_config(model, **{name: other}), name) == other


def test_every_setting_is_a_flag_that_is_explained():
    for field in dataclasses.fields(Config):
        assert len(field.metadata["help"]) > 3, field.name
        value = getattr(Config(), field.name)
        if value is not None and not isinstance(value, bool):
            assert getattr(parse_args([f"--{field.name}", str(value)]), field.name) == value


def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(Config))


def test_a_name_that_is_no_choice_is_refused_without_the_command_line_too():
    with pytest.raises(
        InputError, match="loss_average is 'mean'; it must be one of sequence, token, constant"
    ):
        make_config(loss_average="mean")


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().steps = 3


# --- problem files

GOOD = '{"question": "q", "answer": "1"}'


def write(folder, *lines, name="problems.jsonl"):
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


QUESTION, ANSWER, TESTS, NUMBERS = (
    f"field {name} must be {what}"
    for name, what in (
        ("question", "text, and not empty"),
        ("answer", "text or a number, and not empty; code has tests instead"),
        ("tests", 'a list of assert lines or of {"input", "output"}'),
        ("numbers", "a list of whole numbers"),
    )
)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON (Expecting property name enclosed in double quotes); each line must be one object"),
        ("hello", "not JSON (Expecting value); each line must be one object"),
        ("[1]", "must be an object with question and answer"),
        ("3", "must be an object with question and answer"),
        ('{"answer": "1"}', QUESTION),
        ('{"question": 3, "answer": "1"}', QUESTION),
        ('{"question": " ", "answer": "1"}', QUESTION),
        ('{"question": "q"}', ANSWER),
        ('{"question": "q", "answer": null}', ANSWER),
        ('{"question": "q", "answer": ""}', ANSWER),
        ('{"question": "q", "answer": true}', ANSWER),
        ('{"question": "q", "answer": ["1"]}', ANSWER),
        ('{"question": "q", "answer": "so ####"}', ANSWER),
        ('{"question": "q", "tests": "assert f(1)"}', TESTS),
        ('{"question": "q", "tests": 5}', TESTS),
        ('{"question": "q", "tests": [3]}', TESTS),
        ('{"question": "q", "tests": [{"input": "1"}]}', TESTS),
        ('{"question": "q", "tests": {"input": "1", "output": "2"}}', TESTS),
        ('{"question": "q", "answer": "1", "numbers": 5}', NUMBERS),
        ('{"question": "q", "answer": "1", "numbers": ["x"]}', NUMBERS),
        ('{"question": "q", "answer": "1", "numbers": [1.5]}', NUMBERS),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = write(tmp_path, GOOD, "", line)
    with pytest.raises(InputError) as error:
        read_problems(path)
    assert str(error.value) == f"{path} line 3: {message}"


def test_a_file_without_problems_or_without_utf8_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no problem"):
        read_problems(write(tmp_path, "", "  "))
    (tmp_path / "latin.jsonl").write_bytes('{"question": "é", "answer": "1"}'.encode("latin-1"))
    with pytest.raises(InputError, match="latin.jsonl is not UTF-8 text"):
        read_problems(str(tmp_path / "latin.jsonl"))


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"question": "q", "answer": "7"}, ("q", "7", "math", (), ())),
        ({"question": "q", "answer": 7}, ("q", "7", "math", (), ())),
        ({"problem": "p", "answer": "\\frac{1}{2}", "level": 3}, ("p", "\\frac{1}{2}", "math", (), ())),
        ({"question": "q", "answer": "3 + 4 = 7 so\n#### 7"}, ("q", "7", "math", (), ())),
        ({"question": "q", "answer": "24", "numbers": [1, 2, 12]}, ("q", "24", "countdown", (1, 2, 12), ())),
        ({"question": "q", "answer": "7", "numbers": None, "tests": None}, ("q", "7", "math", (), ())),
        ({"question": "q", "tests": ["assert f(1) == 2"]}, ("q", "", "code", (), ("assert f(1) == 2",))),
        (
            {"question": "q", "answer": "x", "tests": [{"input": "1", "output": "2"}]},
            ("q", "x", "code", (), ({"input": "1", "output": "2"},)),
        ),
        ({"question": "a\u2028b\u0085c", "answer": "天"}, ("a\u2028b\u0085c", "天", "math", (), ())),
    ],
)
def test_a_good_line_is_read(row, expected, tmp_path):
    (problem,) = read_problems(write(tmp_path, json.dumps(row, ensure_ascii=False)))
    assert dataclasses.astuple(problem)[:5] == expected


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    assert read_problems(write(tmp_path, "\ufeff" + GOOD)) == read_problems(write(tmp_path, GOOD))


def test_a_tenth_of_a_file_is_held_out_by_question(tmp_path):
    rows = [
        json.dumps({"question": f"q {i % 150}", "answer": "1"}) for i in range(300)
    ]  # every question twice
    path, backwards = write(tmp_path, *rows), write(tmp_path, *rows[::-1], name="backwards.jsonl")
    training, held_out = (
        {p.question for p in load_problems(path, evaluation)} for evaluation in (False, True)
    )
    assert len(held_out) == 15 and len(training) == 135 and not training & held_out
    assert {
        p.question for p in load_problems(backwards, True, seed=9)
    } == held_out  # of order and seed independent
    assert (
        len(load_problems(path)) + len(load_problems(path, True))
        == len(load_problems(path, whole=True))
        == 300
    )
    more = write(tmp_path, *rows[:60], name="fewer.jsonl")
    assert len({p.question for p in load_problems(more, True)}) == 6


def test_two_questions_are_the_fewest(tmp_path):
    with pytest.raises(InputError, match="one question, too few to hold one out"):
        load_problems(write(tmp_path, GOOD, GOOD))
    path = write(tmp_path, GOOD, '{"question": "r", "answer": "2"}')
    assert len(load_problems(path)) == len(load_problems(path, True)) == 1


@pytest.mark.parametrize("source", ("nothing.jsonl", "gsm9k", "."))
def test_unknown_data_is_named_with_what_there_is(source):
    with pytest.raises(InputError) as error:
        load_problems(source)
    assert repr(source) in str(error.value) and all(
        name in str(error.value) for name in ("countdown", "gsm8k", "math500")
    )


# --- data by name


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A web server on this machine with both data sets, and an empty cache; -> the paths that were asked for."""
    lines = lambda name, count, key: "".join(
        json.dumps({key: f"{name} {i}", "answer": f"so\n#### {i}"}) + "\n" for i in range(count)
    )
    files = {
        "/train.jsonl": lines("train", 5, "question"),
        "/test.jsonl": lines("test", 3, "question"),
        "/math.jsonl": lines("math", 20, "problem"),
    }
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = files.get(self.path, "").encode()
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        base = f"http://127.0.0.1:{web.server_address[1]}"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(grpo, "GSM8K", base + "/{split}.jsonl")
        monkeypatch.setattr(grpo, "MATH500", base + "/math.jsonl")
        before = torch.hub.get_dir()
        torch.hub.set_dir(str(tmp_path / "cache"))
        yield asked
        torch.hub.set_dir(before)
        web.shutdown()


def test_gsm8k_is_fetched_once_and_has_its_own_held_out_part(server):
    for _ in range(2):
        assert [p.question for p in load_problems("gsm8k")] == [f"train {i}" for i in range(5)]
        assert [p.answer for p in load_problems("gsm8k", True)] == ["0", "1", "2"]
    assert server == ["/train.jsonl", "/test.jsonl"]


def test_math500_holds_out_a_tenth(server):
    training, held_out = load_problems("math500"), load_problems("math500", True)
    assert (len(training), len(held_out)) == (18, 2) and server == ["/math.jsonl"]
    assert len(load_problems("math500", True, whole=True)) == 20


def test_what_cannot_be_fetched_leaves_no_file_and_says_what_to_do(server, monkeypatch, tmp_path):
    monkeypatch.setattr(grpo, "MATH500", grpo.MATH500.replace("math", "missing"))
    with pytest.raises(InputError) as error:
        load_problems("math500")
    assert (
        grpo.MATH500 in str(error.value)
        and "--data PATH.jsonl" in str(error.value)
        and "\n" not in str(error.value)
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# --- countdown


def reachable(numbers):
    """Every value that can be made of all numbers, each used once."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    made = set()
    for i in range(len(numbers)):
        for j in range(len(numbers)):
            if i != j:
                a, b, rest = numbers[i], numbers[j], [n for k, n in enumerate(numbers) if k not in (i, j)]
                for value in (a + b, a - b, a * b, Fraction(a) / b if b else None):
                    if value is not None:
                        made |= reachable([value, *rest])
    return made


def test_countdown_problems_can_be_solved_and_say_what_they_are():
    for problem in countdown_problems(40):
        assert (
            problem.task == "countdown" and len(problem.numbers) in (3, 4) and 1 <= int(problem.answer) <= 100
        )
        assert [int(n) for n in re.findall(r"\d+", problem.question)] == [
            *problem.numbers,
            int(problem.answer),
        ]
        assert Fraction(problem.answer) in reachable([*problem.numbers])


def test_countdown_is_a_function_of_the_seed():
    assert countdown_problems(50) == countdown_problems(50) != countdown_problems(50, seed=1)
    assert countdown_problems(50)[:20] == countdown_problems(20)


def test_no_countdown_problem_is_held_out_and_trained_on_in_any_order_or_seed(monkeypatch):
    class SmallNumbers(random.Random):  # so that the same numbers come again
        def randint(self, low, high):
            return super().randint(1, 7)

    monkeypatch.setattr(grpo.random, "Random", SmallNumbers)
    key = lambda p: (tuple(sorted(p.numbers)), p.answer)
    training, held_out = (
        [key(p) for seed in (0, 1) for p in countdown_problems(count, seed, evaluation)]
        for count, evaluation in ((400, False), (60, True))
    )
    assert len(set(training)) > 400 and len(set(held_out)) > 60 and not set(training) & set(held_out)
    assert len(set(training[:400])) == 400  # nor comes a problem twice


# --- prompts


def test_the_template_is_the_papers_word_for_word(tokenizer):
    prompt = grpo.render_prompt(tokenizer, "What is {1} + 2?", Config())
    assert prompt == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first "
        "thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning process and "
        "answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning "
        "process here </think> <answer> answer here </answer>. User: What is {1} + 2?. Assistant:"
    )


def test_the_chat_template_is_used_only_when_asked_for(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    assert grpo.render_prompt(tokenizer, "q", Config(template="Q: {question}")) == "Q: q"
    assert (
        grpo.render_prompt(tokenizer, "q", Config(model="x", chat_template=True)) == "[user] q\n[assistant] "
    )


def test_the_beginning_token_comes_once(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    assert grpo.encode_prompt(tokenizer, "x") == tokenizer("x")["input_ids"]  # a tokenizer that has none
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    plain = grpo.encode_prompt(tokenizer, "x")
    assert plain[0] == begin and plain.count(begin) == 1
    assert grpo.encode_prompt(tokenizer, "<|begin|>x") == plain


def test_help_shows_the_defaults_of_the_model(capsys):
    for model, steps in (("tiny", 70), ("Qwen/Qwen2.5-0.5B", 200)):
        with pytest.raises(SystemExit):
            grpo.parse_args(["--help", "--model", model])
        text = " ".join(capsys.readouterr().out.split())
        assert f"(default: {steps})" in text.split("--steps STEPS")[-1][:120]
