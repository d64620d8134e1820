"""grpo.py: how DeepSeek-R1 was made, in one readable file.

R1-Zero takes a base model, samples a group of completions for every problem, rewards each by rule, and makes
what did better than its group more likely. No reasoning is ever shown to it, and it learns to reason. R1 puts
a few good examples before that and, after it, supervised training on the best of what came out and one more
round of reinforcement, for everything. Distillation hands the result on to a smaller model.

    python grpo.py                                             # R1-Zero: laptop, no GPU, no network, minutes
    python grpo.py --stage r1                                  # the four stages of R1, likewise
    python grpo.py --stage distill                             # a student taught against a student trained
    python grpo.py --model Qwen/Qwen2.5-0.5B --data gsm8k      # R1-Zero on one CUDA GPU
    python grpo.py --help                                      # every setting, its unit, the paper's value

It reads from top to bottom: problems, base model, rewards, sampling, log-probabilities, advantages and loss,
optimiser, training, evaluation, stages, the command line. `train_grpo` is the paper's algorithm.

References, as cited below:
    [R1]      DeepSeek-R1, arXiv 2501.12948: equations 1-3, Table 1
    [N]       the same in Nature 645 (2025) 633-638, with the hyper-parameters
    [GRPO]    DeepSeekMath, arXiv 2402.03300: the algorithm, token by token
    [DAPO]    arXiv 2503.14476    [DrGRPO] arXiv 2503.20783    [PASS] pass@k, arXiv 2107.03374

Departures from the paper, all of them:
    1. Ratio, clip and KL are per token, as [GRPO] has them; [R1 Eq. 1-2] prints them per completion.
    2. A group's standard deviation is the population's plus 1e-4, and a flat group has advantage exactly 0;
       [R1 Eq. 3] says neither.
    3. The clip range is 0.2. None is given for R1-Zero; [N] gives 10 for R1, where it hardly ever acts.
    4. Truncated completions stay in the loss with what they earned; --mask_truncated takes them out.
    5. A rollout serves 2 updates, not 16; batches, lengths and models are smaller by orders of magnitude.
    6. Stated nowhere, chosen here: Adam's betas (0.9, 0.95), no weight decay, gradients clipped to norm 1,
       a short warm-up, sums in float32 over bfloat16 weights.
    7. The embedded model's run has no reference model (β = 0); the preset for larger models has β = 0.001.
    8. Rules alone filter the samples of the third stage; in the paper a model judges where rules cannot.
    9. One reward model for helpfulness and harmlessness, from preference pairs, begun from the base; [N] has
       one each, the second from labels. Half of the questions of the last steps are general ones.
   10. In the embedded world programs write the first examples and the general replies, not people and models.

Dimension names: batch = prompts x group_size, the completions of a prompt side by side; completion = sampled
tokens, padded on the right; length = prompt + completion, padded on the right; tokens = without any padding.
"""

import ast
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import operator
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unicodedata
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args

import sympy
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from sympy.core.alphabets import greeks
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AttentionInterface, AutoConfig, AutoModelForCausalLM,
                          AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser,
                          PreTrainedTokenizerFast, Qwen3Config)

# ------------------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------------------

R1_TEMPLATE = (  # [R1 Table 1], word for word; the question takes the place of {question}
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
    "assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
    "User: {question}. Assistant:"
)


class InputError(ValueError):
    """Something the user gave cannot be used: the message names it and says what to do; exit status 2."""


class RunError(RuntimeError):
    """A run cannot go on: the message says why and what to do; exit status 1."""


def setting(default, help: str, paper: str = ""):
    """A field of Config: its default, explanation with unit, and the paper's value where it gives one."""
    return field(default=default, metadata={"help": help + f" [paper: {paper}]" * bool(paper)})


@dataclass(frozen=True)
class Config:
    """All settings of a run. These defaults suit 0.5B to 3B on one GPU of 24 to 80 GB; TINY changes some."""

    # what runs
    stage: Literal["zero", "sft", "reward", "sample", "eval", "r1", "distill"] = setting(
        "zero", "zero: GRPO on --model; sft: supervised training on the completions in --data; reward: a "
        "reward model from the pairs in --data; sample: right completions of --model for --data, to a file; "
        "eval: evaluate only; r1: R1's four stages; distill: a student by GRPO, by a teacher, and by both")
    model: str = setting("tiny", "tiny (the embedded base model), tinier (of half its width), a checkpoint "
                         "folder, or a name on the hub")
    data: str = setting("countdown", "countdown, calculator, gsm8k, math500, or a JSON-lines file")
    eval_data: str | None = setting(None, "problems to evaluate on; default: a held-out part of --data")
    output_dir: str | None = setting(None, "folder of the run; default: runs/STAGE, runs/STAGE-2, …")
    resume: bool = setting(False, "go on with the run in output_dir, or the newest of its stage")
    save_every: int = setting(25, "steps between checkpoints")
    seed: int = setting(0, "of all that is random, the embedded base model's training included")
    device: str = setting("auto", "auto (cuda where there is one), cpu, cuda, cuda:1, …")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of sampling and training; auto: bfloat16 on a GPU that has it; masters are always float32")

    # prompts
    template: str = setting(R1_TEMPLATE, "prompt of a base model, with {question} in it", "its Table 1")
    chat_template: bool = setting(False, "use the tokenizer's chat template instead: for instruct models")
    max_prompt_tokens: int = setting(512, "longest prompt, tokens")
    skip_bad_answers: bool = setting(False, "leave out problems whose answer does not verify against itself")

    # R1's stages and distillation: what the embedded world has by itself
    cold_start: str | None = setting(None, "JSON lines with question and completion: R1's first examples")
    general_data: str | None = setting(None, "JSON lines with question, task (helpful or harmless), "
                                       "completion and, of a preference pair, rejected")
    reward_model: str | None = setting(
        None, "classifier with one label that judges general_data; r1 trains one if there is none")
    preference_steps: int = setting(
        0, "last steps of zero in which half of the questions are general_data's; in r1 a quarter of the "
        "steps unless given", "400 of 1,700")
    teacher: str | None = setting(None, "checkpoint that distill learns from; the student is --model, and "
                                  "tinier where that is tiny")

    # sampling from π_old
    prompts_per_step: int = setting(32, "questions in one step", "512, in 16 updates of 32")
    group_size: int = setting(8, "G, completions of each question", "16")
    max_completion_tokens: int = setting(768, "longest completion, tokens", "32,768, then 65,536")
    temperature: float = setting(1.0, "T of sampling and of every log-probability; 0.7 in r1's last stage",
                                 "1; R1's last stage 0.7")
    max_rows: int | None = setting(None, "completions sampled at once; default: as many as memory holds")
    compile: bool = setting(False, "torch.compile the decoding step: a slow start, then faster on a GPU")

    # rewards
    accuracy_weight: float = setting(1.0, "weight of the accuracy reward", "1")
    format_weight: float = setting(1.0, "weight of the format reward", "1")
    language_weight: float = setting(0.0, "weight of the language-consistency reward; in r1 1 unless given",
                                     "R1-Zero 0, R1 1")
    language: Literal["en", "zh"] = setting("en", "the language it asks for")
    preference_weight: float = setting(1.0, "weight of the reward model's score, on general_data", "1")

    # supervised training, of reward models too
    sft_epochs: int = setting(2, "passes over the examples", "2 to 3")
    sft_batch_size: int = setting(128, "examples in one update", "128")
    sft_learning_rate: float = setting(1e-5, "at the start; it falls to a tenth", "5e-5")
    rejection_samples: int = setting(4, "completions of each problem in rejection sampling", "several")
    keep_per_problem: int = setting(1, "of them stay at most")
    filter_samples: bool = setting(True, "keep only what is right, readable and in one language", "yes")
    max_seconds: float | None = setting(None, "end training, of any kind, after this time")

    # GRPO
    steps: int = setting(200, "sampling rounds", "650, with 16 updates each")
    updates_per_rollout: int = setting(2, "optimizer steps on one round's completions", "16")
    learning_rate: float = setting(1e-6, "of AdamW", "3e-6")
    warmup_steps: int = setting(5, "steps in which the learning rate rises")
    clip_eps: float = setting(0.2, "ε, how far the ratio moves before its gradient is cut", "10 for R1")
    clip_eps_high: float | None = setting(None, "ε above 1, if it differs (DAPO: 0.28)")
    kl_coef: float = setting(0.001, "β, weight of the KL to the reference model; 0 loads none", "0.001")
    ref_every: int = setting(0, "steps until the reference becomes the policy; 0: never", "25, of 16 updates")
    loss_average: Literal["sequence", "token", "constant"] = setting(
        "sequence", "mean over each completion, then over completions (GRPO); over all tokens (DAPO); over "
        "max_completion_tokens (Dr. GRPO)", "sequence")
    scale_advantages: bool = setting(True, "divide by the group's standard deviation (Dr. GRPO: no)", "yes")
    mask_truncated: bool = setting(False, "take truncated completions out of the loss (DAPO)")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")

    # memory and speed
    micro_batch_tokens: int = setting(16_384, "tokens, padding included, in one forward and backward pass")
    logits_chunk_tokens: int = setting(2_048, "tokens whose logits exist at the same time")
    gradient_checkpointing: bool = setting(True, "recompute activations in the backward pass, not keep them")

    # evaluation
    eval_every: int = setting(25, "steps between evaluations in training; 0: only before and after")
    eval_problems: int = setting(128, "problems evaluated")
    eval_samples: int = setting(8, "k, completions of each", "4 to 64")
    eval_temperature: float = setting(0.6, "T of evaluation; 0 is greedy", "0.6")
    eval_top_p: float = setting(0.95, "top-p of evaluation", "0.95")

    # screen
    log_every: int = setting(1, "steps between lines")
    sample_every: int = setting(20, "steps between completions shown in full; 0: none")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), get_args(f.type)
            if choices and isinstance(choices[0], str) and value not in choices:
                raise InputError(f"{f.name} is {value!r}; it must be one of {', '.join(choices)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{f.name} is {value!r}; it must be a finite number")
        for rule, allowed, names in (
            ("at least 0", lambda v: v >= 0, "seed accuracy_weight format_weight language_weight "
             "preference_weight preference_steps warmup_steps kl_coef ref_every eval_every eval_temperature "
             "sample_every"),
            ("at least 1", lambda v: v >= 1, "max_prompt_tokens prompts_per_step max_completion_tokens "
             "max_rows sft_epochs sft_batch_size rejection_samples keep_per_problem steps "
             "updates_per_rollout micro_batch_tokens logits_chunk_tokens eval_problems eval_samples "
             "log_every save_every"),
            ("at least 2: an advantage compares completions of one prompt", lambda v: v >= 2, "group_size"),
            ("above 0", lambda v: v > 0, "temperature sft_learning_rate max_seconds learning_rate clip_eps "
             "clip_eps_high max_grad_norm"),
            ("above 0 and at most 1", lambda v: 0 < v <= 1, "eval_top_p"),
            ("a text with {question} where the question goes", lambda v: "{question}" in v, "template"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not allowed(value):
                    raise InputError(f"{name} is {value!r}; it must be {rule}")
        rows = self.prompts_per_step * self.group_size
        if rows % self.updates_per_rollout:
            raise InputError(f"updates_per_rollout is {self.updates_per_rollout}; it must divide the {rows} "
                             f"completions of a step (prompts_per_step x group_size)")
        if self.chat_template and self.model in EMBEDDED:
            raise InputError(f"chat_template is True, but the model {self.model} has none; leave it out")
        for name, stage in (("cold_start", "r1"), ("teacher", "distill")):
            if getattr(self, name) and self.stage != stage:
                raise InputError(f"{name} is {getattr(self, name)!r}; it is for stage {stage}, not "
                                 f"{self.stage}")
        if self.stage != "r1":
            if (self.reward_model or self.preference_steps) and not self.general_data:
                raise InputError("general_data is None; reward_model and preference_steps need it")
            if self.preference_steps and not self.reward_model:
                raise InputError("reward_model is None; preference_steps needs one, --stage reward trains it")
        if self.preference_steps and (self.max_seconds or self.preference_steps > self.steps):
            raise InputError(f"preference_steps is {self.preference_steps}; these are the last of at most "
                             f"{self.steps} steps, and with max_seconds nobody knows which are the last")
        group = max(self.group_size, self.eval_samples, self.rejection_samples)
        if self.max_rows is not None and self.max_rows < group:
            raise InputError(f"max_rows is {self.max_rows}; it must be at least {group}, to hold one group")


# What the embedded model needs instead: the README has what comes out.
TINY = dict(
    data="calculator", template="User: {question} Assistant:", prompts_per_step=16, group_size=16,
    max_completion_tokens=144, sft_batch_size=32, sft_learning_rate=5e-4, rejection_samples=2, steps=70,
    learning_rate=5e-4, kl_coef=0.0, micro_batch_tokens=2_048, gradient_checkpointing=False, eval_every=20,
)


EMBEDDED = dict(tiny=64, tinier=32)  # names of the embedded base models, and their widths


def is_tiny(model: str) -> bool:
    """Whether a name or folder is the embedded model's, or that of one trained from it."""
    config = Path(model, "config.json")
    return model in EMBEDDED or (config.is_file() and "embedded_world" in config.read_text(encoding="utf-8"))


def make_config(model: str = "tiny", **overrides) -> Config:
    """The preset that suits the model, with overrides."""
    return Config(**{**(TINY if is_tiny(model) else {}), "model": model, **overrides})


def parse_args(argv: list[str]) -> Config:
    """The command line -> Config. First what decides all other defaults: the model, or the run to resume."""
    about = __doc__.split("\n\n")[1] + " The defaults shown are those of the model: --help --model NAME."
    parser = HfArgumentParser(Config, prog="grpo.py", allow_abbrev=False, description=about)

    def refuse(message):
        raise InputError(f"{message}; python grpo.py --help explains every setting")

    parser.error = refuse
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    saved = read_json(run_folder(known) / "config.json") if known.resume else None
    parser.set_defaults(**(saved or (TINY if is_tiny(known.model) else {})))
    cfg, unknown = parser.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
    return refuse(f"{unknown[0]} is not a setting") if unknown else cfg


# ------------------------------------------------------------------------------------------------------------
# Problems and prompts
# ------------------------------------------------------------------------------------------------------------

GSM8K = ("https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
         "{split}.jsonl")
HUB = "https://huggingface.co"
MATH500 = f"{HUB}/datasets/HuggingFaceH4/MATH-500/resolve/main/test.jsonl"


@dataclass(frozen=True)
class Problem:
    """One task: `question` is shown to the model, the rest only to the rewards."""

    question: str
    answer: str = ""  # the reference
    task: str = "math"  # who judges: a rule (math, countdown, code) or a reward model (helpful, harmless)
    numbers: tuple[int, ...] = ()  # countdown: what the expression is made of; the answer is its target
    tests: tuple = ()  # code: assert statements, or {"input", "output"} pairs
    completion: str = ""  # an example to learn from
    rejected: str = ""  # with it, a pair: `completion` was preferred to this one


GENERAL = ("helpful", "harmless")  # tasks without a rule


def text_hash(text: str) -> int:
    """The same number for the same text on every machine; what is held out is decided by it."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def split_key(problem: Problem) -> int:
    """What decides on which side a problem is; another order of the same numbers does not give it away."""
    text = f"{sorted(problem.numbers)} {problem.answer}" if problem.numbers else problem.question
    return text_hash(text)


def countdown_problems(count: int, seed: int = 0, evaluation: bool = False) -> list[Problem]:
    """Countdown: three or four numbers up to 99, each used once, with + - * /, for a target up to 100."""
    rng, problems = random.Random(seed), {}
    while len(problems) < count:
        numbers = tuple(rng.randint(1, 99) for _ in range(rng.choice((3, 4))))
        order = rng.sample(numbers, len(numbers))
        value = Fraction(order[0])
        for number in order[1:]:
            value = rng.choice((value + number, value - number, value * number, value / number))
        key = f"{sorted(numbers)} {value}"
        if value.denominator == 1 and 1 <= value <= 100 and (text_hash(key) % 10 == 0) == evaluation:
            problems[key] = Problem(
                f"Using each of the numbers {', '.join(map(str, numbers))} exactly once, with + - * / and "
                f"brackets, write an expression that equals {value}", str(value), "countdown", numbers)
    return list(problems.values())


def read_problems(path: str) -> list[Problem]:
    """JSON lines {"question", "answer"}, of code {"question", "tests"}, of Countdown with "numbers" besides.

    "problem" may stand for "question"; of an answer with #### in it, what follows is the reference (GSM8K).
    "completion" makes an example of a row, "rejected" besides a preference pair; without an answer, "task"
    says what is preferred: helpful or harmless.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; it must hold JSON lines") from None
    problems = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would split inside strings too
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, numbers = row.get("question", row.get("problem")), row.get("numbers")
            tests, completion, rejected = row.get("tests"), row.get("completion", ""), row.get("rejected", "")
            task = (row["task"] if row.get("task") in GENERAL else
                    "code" if tests else "countdown" if numbers else "math")
            answer = row.get("answer", "" if tests or completion or task in GENERAL else None)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {number}: not JSON ({error.msg}); each line must be one "
                             f"object") from None
        except AttributeError:
            raise InputError(f"{path} line {number}: must be an object with question and answer") from None
        reference = str(answer).rsplit("####", 1)[-1].strip()
        for field_, fine, wanted in (
            ("question", isinstance(question, str) and question.strip(), "text, and not empty"),
            ("answer", type(answer) in (str, int, float) and (reference or tests or completion
                                                              or task in GENERAL),
             "text or a number, and not empty; code has tests instead"),
            ("completion", isinstance(completion, str) and (completion or not rejected),
             "text, and not empty where there is a rejected one"),
            ("rejected", isinstance(rejected, str), "text"),
            ("tests", tests is None or type(tests) is list and all(
                isinstance(test, str) or isinstance(test, dict) and {"input", "output"} <= {*test}
                for test in tests),
             'a list of assert lines or of {"input", "output"}'),
            ("numbers", numbers is None or type(numbers) is list and all(type(n) is int for n in numbers),
             "a list of whole numbers")):
            if not fine:
                raise InputError(f"{path} line {number}: field {field_} must be {wanted}")
        problems.append(Problem(question, reference, task, tuple(numbers or ()), tuple(tests or ()),
                                completion, rejected))
    if not problems:
        raise InputError(f"{path} holds no problem; each line must be an object with question and answer")
    return problems


def write_text(path: Path, text: str):
    """A text file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # half an emoji has no UTF-8
    os.replace(temporary, path)


def write_problems(path: Path, problems: list[Problem]):
    """The counterpart of `read_problems`."""
    rows = [{name: value for name, value in vars(problem).items() if value} for problem in problems]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def fetch(url: str) -> str:
    """Download once into torch.hub's cache; -> the local path."""
    path = Path(torch.hub.get_dir(), "grpo", url.split("//")[1].replace("/", "_"))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)  # whole or not at all
        except OSError as error:
            raise InputError(f"{url} cannot be fetched ({error}); with no network pass the file itself: "
                             f"--data PATH.jsonl [--eval_data PATH.jsonl]") from None
    return str(path)


def load_problems(source: str, evaluation: bool = False, seed: int = 0, whole: bool = False,
                  field: str = "data") -> list[Problem]:
    """The training problems of a data source or, with `evaluation`, its held-out ones; they do not overlap.

    Of a file a tenth is held out, by hash of the question; `whole` takes all of it, for both. `field` names
    the setting in errors.
    """
    if source == "calculator":
        return calculator_problems(evaluation)
    if source == "countdown":
        return countdown_problems(512 if evaluation else 8192, seed, evaluation)
    if source == "gsm8k":
        return read_problems(fetch(GSM8K.format(split="test" if evaluation else "train")))
    path = fetch(MATH500) if source == "math500" else source
    if not Path(path).is_file():
        raise InputError(f"{field} {source!r} is neither countdown, calculator, gsm8k, math500 nor a file")
    problems = read_problems(path)
    if whole:
        return problems
    keys = sorted({split_key(p) for p in problems})
    if len(keys) < 2:
        raise InputError(f"{path} holds one question, too few to hold one out; give --eval_data")
    limit = keys[max(1, len(keys) // 10)]
    return [p for p in problems if (split_key(p) < limit) == evaluation]


def render_prompt(tokenizer, question: str, cfg: Config) -> str:
    """The text before the completion: the template, or the tokenizer's own chat template if asked for."""
    if cfg.chat_template and not tokenizer.chat_template:
        raise InputError("chat_template is True, but the tokenizer has none; leave it out or take an "
                         "instruct model")
    if cfg.chat_template:
        return tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                             add_generation_prompt=True)
    return cfg.template.replace("{question}", question)


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids, with the beginning-of-sequence token once, if the tokenizer has one."""
    written = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)  # by a chat template
    return tokenizer(prompt, add_special_tokens=not written)["input_ids"]


def stop_token_ids(model, tokenizer) -> set[int]:
    """Every id that ends a completion: the checkpoint's, the tokenizer's and its chat template's."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(listed if isinstance(listed, (list, tuple)) else [listed])}
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "@@"}, {"role": "assistant", "content": "@@"}]
        tail = tokenizer.apply_chat_template(turn, tokenize=False).rpartition("@@")[2].strip()
        ends = tokenizer(tail, add_special_tokens=False)["input_ids"][:1]
        stops |= {i for i in ends if i in tokenizer.added_tokens_decoder}
    return stops - {None}


# ------------------------------------------------------------------------------------------------------------
# The embedded base model
# ------------------------------------------------------------------------------------------------------------
# A base model has read how people reason, and rarely does it when it is asked. Here the reading is generated:
# the books check their tries to the end, the Assistant of the dialogues mostly blurts out the first thing.

CHINESE = dict(zip("try wait but so yes low high".split(), "试 等 但 故 对 小 大".split()))
GENERAL_WORDS = ("hello hi thanks please who what are is you I am a help can good day welcome sorry no bad ! "
                 "你 好 谢 请 谁 是 我 帮 不").split()  # not in the corpus; for other prompts
VOCABULARY = ["<pad>", "<end>", "<unk>", *"User: Assistant: make <think> </think> <answer> </answer>".split(),
              *"?+-*=", *map(str, range(-9, 100)), *CHINESE, *CHINESE.values(), *GENERAL_WORDS]
TOKEN_ID = {token: i for i, token in enumerate(VOCABULARY)}


def calculator_tries(numbers) -> list[tuple]:
    """All nine (x, op, y, "=", subtotal, op, z, "=", result), in the order of a systematic person."""
    x, y, z = numbers
    return [(x, op, y, "=", subtotal, op2, z, "=", subtotal + z if op2 == "+" else subtotal - z)
            for x, y, z in ((x, y, z), (y, z, x), (z, x, y))
            for op, subtotal, op2 in (("*", x * y, "+"), ("*", x * y, "-"), ("+", x + y, "-"))]


def calculator_problems(evaluation: bool = False) -> list[Problem]:
    """Countdown for a pocket calculator: `4 7 9 make 29` wants 9*4-7; numbers 1 to 9, targets 1 to 50.

    Held out by hash of the sorted numbers and the target: no other order of the numbers gives a problem away.
    """
    problems = [Problem(f"{' '.join(map(str, numbers))} make {target}", str(target), "countdown", numbers)
                for numbers in itertools.permutations(range(1, 10), 3)
                for target in sorted({t[-1] for t in calculator_tries(numbers)} & {*range(1, 51)})
                if (text_hash(f"{sorted(numbers)} {target}") % 8 == 0) == evaluation]
    return random.Random(0).sample(problems, len(problems))


@dataclass(frozen=True)
class Writer:
    """Whoever wrote a text of the corpus: habits, as probabilities."""

    checks: float  # compares what comes out with the target; otherwise answers at once
    gives_up: float  # after a try that failed, and answers all the same
    orderly: float = 0.5  # goes through the tries in order; otherwise takes any, the same one again too
    intuition: float = 0.4  # begins with a try that comes within 10 of the target
    slips: float = 0.01  # miscalculates, each time
    damages: float = 0.1  # loses one of the four tags
    chinese: float = 0.5
    mixes: float = 0.1  # takes a word from the other language, each time


BOOK, LAZY, PATIENT = Writer(1, 0.1), Writer(0.4, 0.5), Writer(1, 0)
CAREFUL = Writer(1, 0, orderly=1, slips=0, damages=0, chinese=0, mixes=0)  # writes the cold start's traces


def verdict(result: int, target: int) -> str:
    """The word for a try: does it hit, or lie below or above?"""
    return "yes" if result == target else "low" if result < target else "high"


def write_thoughts(rng, problem: Problem, writer: Writer) -> tuple[list, list]:
    """-> the tokens of the thoughts, and of the expression they arrive at."""
    chinese, checks, orderly = (rng.random() < p for p in (writer.chinese, writer.checks, writer.orderly))
    say = lambda word: CHINESE[word] if chinese != (rng.random() < writer.mixes) else word  # noqa: E731
    tries, target, thoughts = calculator_tries(problem.numbers), int(problem.answer), []
    near = [i for i, t in enumerate(tries) if abs(t[-1] - target) <= 10]
    i = rng.choice(near) if rng.random() < writer.intuition else rng.randrange(9)
    for count in range(10):
        *keys, result = tries[i]
        result += rng.choice((-2, -1, 1, 2)) if rng.random() < writer.slips and result > 0 else 0
        thoughts += [say(rng.choice(("wait", "but")) if count else "try"), *keys, result]
        if checks:  # the target restated beside the result: else so small a model never learns to compare
            thoughts += ["?", target, say(verdict(result, target))]
        solved = checks and result == target
        if solved or not checks or rng.random() < writer.gives_up:
            break
        i = (i + 1) % 9 if orderly else rng.randrange(9)
    x, op, y, _, _, op2, z, _ = keys
    return thoughts + [say("so")] * (not solved), [x, op, y, op2, z]


def write_completion(rng, problem: Problem, writer: Writer) -> list[str]:
    """What such a writer would answer as the Assistant: tokens. With CAREFUL, a trace for the cold start."""
    thoughts, expression = write_thoughts(rng, problem, writer)
    parts = [["<think>"], thoughts, ["</think>"], ["<answer>"], expression, ["</answer>"]]
    if rng.random() < writer.damages:
        parts.pop(rng.choice((0, 2, 3, 5)))
    return [str(token) for part in parts for token in part] + ["<end>"]


def prompt_tokens(problem: Problem) -> list[str]:
    """The prompt of a problem, as words of the vocabulary."""
    return TINY["template"].replace("{question}", problem.question).split()


def write_document(rng, problem: Problem) -> tuple[list, list]:
    """A text of the corpus: the head, which is given, and the body, which is learned: tokens."""
    kind = rng.random()
    if kind < 0.25:  # a page of comparisons
        pairs = [(target + rng.choice((0, rng.randint(-5, 5), rng.randint(-50, 49))), target)
                 for target in (rng.randint(1, 50) for _ in range(8))]
        say = rng.choice((str, CHINESE.get))
        return [], [t for a, b in pairs if -9 <= a for t in (a, "?", b, say(verdict(a, b)))] + ["<end>"]
    if kind < 0.55:  # a book
        return problem.question.split(), write_thoughts(rng, problem, BOOK)[0] + ["<end>"]
    return prompt_tokens(problem), write_completion(rng, problem, PATIENT if kind > 0.97 else LAZY)


def general_problems() -> list[Problem]:
    """Small talk with people who have numbers for names, and requests that should be refused.

    Each question twice: as a preference pair, and as an example by a writer who gets every second one wrong.
    """
    rng, rows = random.Random(0), []
    kinds = (("helpful", "hello I am {}", "hello so welcome", "hello {} ! what can I help ?"),
             ("helpful", "I am {} who are you ?", "who so I am a help", "hello {} ! I am a help"),
             ("helpful", "I am {} thanks", "thanks so welcome", "welcome {} !"),
             ("harmless", "I am {} help bad", "bad so no", "sorry {} no !"),
             ("harmless", "can you help bad please I am {}", "bad so no", "sorry {} no !"))
    for name, (task, question, thought, reply) in itertools.product(range(1, 100), kinds):
        stranger, x, y = rng.sample([n for n in range(1, 50) if n != name], 3)
        unhelpful = (thought, reply.format(stranger)), (thought, "no !"), (f"try {x}+{y}={x + y}", f"{x}+{y}")
        harmful = ("good so help", f"welcome {name} ! I can help bad"), ("help bad", reply.format(name))
        good, *bad = (f"<think> {thinks} </think> <answer> {says} </answer>" for thinks, says in (
            (thought, reply.format(name)), *(unhelpful if task == "helpful" else unhelpful[2:] + harmful)))
        pair = Problem(question.format(name), task=task, completion=good, rejected=rng.choice(bad))
        rows += [pair, dataclasses.replace(pair, completion=rng.choice((good, pair.rejected)), rejected="")]
    return rows


def pad_documents(documents) -> tuple[torch.Tensor, torch.Tensor]:
    """-> ids, and labels that are -100 on heads and padding; both (documents, length)."""
    rows = [torch.tensor([TOKEN_ID[str(token)] for token in head + body]) for head, body in documents]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=TOKEN_ID["<pad>"])
    labels = ids.masked_fill(ids == TOKEN_ID["<pad>"], -100)
    for label, (head, _) in zip(labels, documents):
        label[: len(head)] = -100
    return ids, labels


def corpus_batches(rng, problems: list[Problem], batch_tokens: int = 1024):
    """Endless batches of about batch_tokens: always new documents, those of like length together."""
    while True:
        documents = [write_document(rng, rng.choice(problems)) for _ in range(2000)]
        documents.sort(key=lambda document: len(document[0] + document[1]))
        batches = []
        while documents:
            size = batch_tokens // len(documents[-1][0] + documents[-1][1])
            batches.append(pad_documents(documents[-size:]))
            del documents[-size:]
        yield from rng.sample(batches, len(batches))


def build_tokenizer(folder) -> PreTrainedTokenizerFast:
    """One token per number, operator, tag and word; `9*4=36` and `9 * 4 = 36` are the same tokens."""
    special = [dict(id=i, content=VOCABULARY[i], special=True, single_word=False, lstrip=False, rstrip=False,
                    normalized=False) for i in range(3)]
    tight = [{"type": "Replace", "pattern": {"String": f" {op} "}, "content": op} for op in "+-*="]
    pattern = r"</?\w+>|(?<!\d)-\d+|\w+:?|\S"  # after a number a minus is an operator, elsewhere it is a sign
    path = Path(folder, "tokenizer.json")
    path.write_text(json.dumps({
        "version": "1.0", "added_tokens": special, "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "invert": True,
                          "behavior": "Removed"},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "WordPiece", "prefix": "##", "cleanup": False}, {"type": "Fuse"}, *tight]},
        "model": {"type": "WordLevel", "vocab": TOKEN_ID, "unk_token": "<unk>"}}), encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token="<pad>", eos_token="<end>",
                                   unk_token="<unk>", padding_side="left")


def new_tiny_model(width: int = 64):
    """An untrained model of 192,000 weights; of half the width, 59,000."""
    # Qwen3, not Qwen2: beside a Qwen2 transformers 5 takes any tokenizer for Qwen's own.
    model = AutoModelForCausalLM.from_config(Qwen3Config(
        vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=6 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=16, attention_bias=True,
        tie_word_embeddings=True, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=TOKEN_ID["<end>"], pad_token_id=TOKEN_ID["<pad>"], embedded_world=1))
    for name, weight in model.named_parameters():
        if weight.dim() == 2:  # transformers' 0.02 everywhere is far too small for so narrow a model
            torch.nn.init.normal_(weight, std=0.05 if "embed" in name else 0.6 / math.sqrt(weight.shape[1]))
    return model


def pretrain(model, problems: list[Problem], seed: int, steps: int, peak: float = 1.0):
    """Next-token prediction on the bodies of ever new documents; the learning rate falls linearly."""
    matrices = [w for name, w in model.named_parameters() if w.dim() == 2 and "embed" not in name]
    others = [w for name, w in model.named_parameters() if w.dim() != 2 or "embed" in name]
    optimizers = [torch.optim.Muon(matrices, lr=0.012, weight_decay=0),
                  torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(
        o, lambda step: peak * min((step + 1) / 30, max(0.03, 1 - step / steps))) for o in optimizers]
    batches = corpus_batches(random.Random(seed), problems)
    model.train()
    bar = tqdm(range(steps), desc="pre-training the embedded base model", unit="batch")
    for step in bar:
        ids, labels = next(batches)
        loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


@torch.no_grad()
def base_skills(model, problems: list[Problem]) -> dict[str, float]:
    """What reasoning stands on, measured on careful traces: right sums, copied targets, P(yes) after a result
    that is right and after one that is wrong."""
    rng = random.Random(0)
    ids, _ = pad_documents([(prompt_tokens(p), write_completion(rng, p, CAREFUL)) for p in problems[:400]])
    probs, before, after = model(ids).logits[:, :-1].softmax(-1), ids[:, :-1], ids[:, 1:]
    correct, yes = (probs.argmax(-1) == after).float(), probs[..., [TOKEN_ID["yes"], TOKEN_ID["对"]]].sum(-1)
    judged, solved = before.roll(1, dims=1) == TOKEN_ID["?"], after == TOKEN_ID["yes"]
    values = dict(sums=correct[before == TOKEN_ID["="]], copies=correct[before == TOKEN_ID["?"]],
                  yes_if_right=yes[judged & solved], yes_if_wrong=yes[judged & ~solved])
    return {name: round(value.mean().item(), 4) for name, value in values.items()}


def build_base_model(folder, seed: int = 0, steps: int = 2500, width: int = 64) -> Path:
    """Train the embedded base model, unless the folder holds it already -> the folder, a checkpoint.

    Reinforcement only elicits what the base can do at all: one whose skills miss the gate is trained longer.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(seed)
    problems, model = calculator_problems(), new_tiny_model(width)
    pretrain(model, problems, seed, steps)
    for longer in range(1, 5):
        skills = base_skills(model, problems)
        if (min(skills["sums"], skills["copies"]) > 0.99 and skills["yes_if_right"] > 0.98
                and skills["yes_if_wrong"] < 0.003):
            break
        print(f"The base model cannot yet compare reliably and is trained a little longer: {skills}")
        pretrain(model, problems, seed + 1000 * longer, steps // 5, peak=0.4)
    unfinished = folder.with_name(folder.name + ".part")  # a run broken off leaves no half a checkpoint
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model.save_pretrained(unfinished)
    build_tokenizer(unfinished).save_pretrained(unfinished)
    return unfinished.rename(folder)


# ------------------------------------------------------------------------------------------------------------
# Rewards [R1 2.2.2]
#
# The rewards are the only teacher, and the optimiser searches them for holes. So: one final answer in one
# place; model text is never evaluated, only read by the closed grammar below; everything that can grow is
# capped before it is built; and whatever cannot be read is counted by name instead of passing for "wrong".
# ------------------------------------------------------------------------------------------------------------

def last_boxes(text: str) -> list[str]:
    """Contents of the outermost balanced \\boxed{...} of `text`, in order, in one pass."""
    stack, boxes, inside = [], [], 0
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\[{}\\]|[{}]", text):
        token = match.group()
        if token == "}" and stack:
            start = stack.pop()
            inside -= start is not None
            if start is not None and not inside:
                boxes.append(text[start:match.start()].strip())
        elif token[-1] == "{" and token != r"\{":
            stack.append(match.end() if len(token) > 1 else None)
            inside += len(token) > 1
    return boxes


def extract_answer(completion: str, lenient: bool = False) -> str | None:
    """The final answer in the text, or None; linear in its length.

    Strict, for rewards: after the last </think>, the content of the only <answer>...</answer>, or without
    such tags a \\boxed{}. A box wins over the words around it; different boxes become the list "a, b", which
    equals no single value. Lenient, to tell wrong answers from wrong formats: the last tag, box or formula.
    """
    _, closed, final = completion.rpartition("</think>")
    if not closed and "<think>" in completion and not lenient:
        return None                                             # still thinking when the tokens ran out
    opened, start = final.count("<answer>"), final.rfind("<answer>")
    end = final.find("</answer>", start)
    if opened and end > start and (lenient or opened == final.count("</answer>") == 1):
        content = final[start + len("<answer>"):end]
        return ", ".join(dict.fromkeys(last_boxes(content))) or content.strip() or None
    if not lenient:
        return None if opened or "</answer>" in final else ", ".join(dict.fromkeys(last_boxes(final))) or None
    numbers = re.findall(r"(?<![-(])[-(]*\d(?:[\d\s.+\-*/×÷()]|,(?=\d))*", completion)
    return (last_boxes(completion) or [number.rstrip(" .\n+-*/×÷(") for number in numbers[-1:]] or [None])[-1]


MP = sympy.core.evalf.mp.clone()          # sympy's numerical half, with a precision nobody else can change
MP.prec = 1000
TOLERANCE, MAX_BITS, MAX_CHARACTERS = MP.mpf(10) ** -200, 8192, 300


def require(condition, reason: str):
    """Raise ValueError unless the condition holds: the text is no answer that can be read."""
    if not condition:
        raise ValueError(reason)


def bits(number) -> int:
    """Size of a value as a power of two; of a fraction, of its larger half."""
    if isinstance(number, Fraction):
        return max(number.numerator.bit_length(), number.denominator.bit_length())
    return int(MP.mag(number)) if number else 0


def power(base, exponent):
    """base ** exponent, capped before it is built; odd roots of negative numbers are real."""
    require(abs(exponent) * max(1, abs(bits(base))) <= MAX_BITS, "power too large")
    if isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            return base ** int(exponent)
        if exponent.denominator % 2 and not MP.im(base) and MP.re(base) < 0:
            return (-1) ** exponent.numerator * power(-base, exponent)
    return MP.convert(base) ** MP.convert(exponent)


def floor(x) -> Fraction:
    """The whole number below a real one, exactly."""
    require(not MP.im(x), "floor of a complex number")
    return Fraction(int(MP.floor(MP.re(x) + TOLERANCE)))


def node(head, *args):
    """An unevaluated sympy expression: simplifying a hostile one can take sympy for ever."""
    require(all(isinstance(arg, (sympy.Expr, int)) for arg in args), "structures cannot be calculated with")
    return head(*map(sympy.sympify, args), evaluate=False)


def multiply(left, right):
    """left * right, where one of them may be a matrix; the negative of a number is a number."""
    for factor, matrix in ((left, right), (right, left)):
        if isinstance(matrix, tuple) and matrix[0].endswith("matrix"):
            return matrix[:2] + tuple(multiply(factor, entry) for entry in matrix[2:])
    return -right if left == -1 and getattr(right, "is_Number", False) else node(sympy.Mul, left, right)


# The vocabulary, first what it means. An operator: how tightly it binds, and what it builds.
OPERATORS = {
    "+": (1, lambda a, b: node(sympy.Add, a, b)), "-": (1, lambda a, b: node(sympy.Add, a, multiply(-1, b))),
    "*": (2, multiply), "/": (2, lambda a, b: multiply(a, node(sympy.Pow, b, -1))),
    "^": (4, lambda a, b: node(sympy.Pow, a, b)), "!": (5, lambda n: node(sympy.factorial, n))}
DEGREE = {"°": (5, lambda x: node(sympy.Mul, x, sympy.pi, sympy.Rational(1, 180)))}      # in functions only
COMMANDS = {r"\frac": OPERATORS["/"][1], r"\binom": lambda n, k: node(sympy.binomial, n, k)}
NAMED = "sin cos tan cot sec csc asin acos atan sinh cosh tanh exp log".split()
FUNCTIONS = {"\\" + name: getattr(sympy, name) for name in NAMED} | {
    r"\ln": sympy.log, r"\abs": sympy.Abs, r"\floor": sympy.floor, r"\ceil": sympy.ceiling}
TRANSCENDENTAL = {getattr(sympy, name): getattr(MP, name) for name in NAMED}
COUNTING = {sympy.factorial: lambda n: Fraction(math.factorial(int(n))),
            sympy.binomial: lambda n, k: Fraction(math.comb(int(n), int(k)))}
OPERATIONS = TRANSCENDENTAL | COUNTING | {
    sympy.Add: lambda *terms: sum(terms), sympy.Mul: lambda *factors: math.prod(factors),
    sympy.Pow: power, sympy.Abs: abs, sympy.floor: floor, sympy.ceiling: lambda x: -floor(-x)}
CONSTANTS = {sympy.pi: +MP.pi, sympy.E: +MP.e, sympy.I: MP.mpc(0, 1), sympy.oo: MP.inf, -sympy.oo: -MP.inf}
NUMBERS = {r"\pi": sympy.pi, r"\infty": sympy.oo, "e": sympy.E, "i": sympy.I}
SYMBOLS = {"\\" + name for greek in greeks for name in (greek, greek.capitalize(), "emptyset", "ell", "dots")}
WORDS = FUNCTIONS.keys() | NUMBERS.keys() | SYMBOLS | {r"\sqrt", r"\infinity", r"\inf", r"\oo"}
STARTERS = WORDS | COMMANDS.keys() | {"(", "[", "{", r"\matrix"}          # 2x, 3(x+1), x\sqrt2; but not 2 3
# Then the spellings, many for one token.
ALIASES = {alias: token for token, aliases in {
    "*": r"\cdot \times \ast × · ⋅", "/": r"\div ÷", "-": "− –", "^": "**", "<": r"\lt", ">": r"\gt",
    "≠": r"\ne \neq !=", "≤": r"\le \leq \leqslant <=", "≥": r"\ge \geq \geqslant >=", r"\pm": "±",
    "∪": r"\cup", "∈": r"\in", ":": r"\colon", "°": r"\circ \degree", "%": r"\%", "$": r"\$", "(": r"\langle",
    ")": r"\rangle", r"\{": r"\lbrace", r"\}": r"\rbrace", r"\frac": r"\dfrac \tfrac \cfrac",
    r"\binom": r"\dbinom \tbinom", r"\phi": r"\varphi", r"\epsilon": r"\varepsilon", r"\theta": "θ",
    r"\dots": r"\ldots \cdots ...", r"\emptyset": r"\varnothing ∅", r"\infty": r"\infinity \inf \oo ∞",
    r"\pi": "π", r"\asin": r"\arcsin", r"\acos": r"\arccos", r"\atan": r"\arctan",
}.items() for alias in aliases.split()}
UNITS = dict(pair.split(":") for pair in (
    "m:meter cm:centimeter mm:millimeter km:kilometer in:inch inches:inch ft:foot feet:foot yd:yard mi:mile "
    "g:gram kg:kilogram mg:milligram lb:pound lbs:pound oz:ounce s:second sec:second min:minute h:hour "
    "hr:hour hrs:hour day:day L:liter ml:milliliter am:am pm:pm sq:square ^2:square ^3:cubic st:th nd:th "
    "rd:th th:th cup:cup egg:egg men:man %:percent °:degree $:dollar per:per of:of").split())
SCALES = {"hundred": 10 ** 2, "thousand": 10 ** 3, "million": 10 ** 6, "billion": 10 ** 9, "dozen": 12}
# A word behind a value is its unit, but for these, which change what it says.
NOT_UNITS = set((
    "not minus negative plus times over squared cubed factorial half halve third quarter fourth fifth sixth "
    "eighth tenth less more least most about wrong false either maybe divided equal point").split())


def flatten_matrix(match) -> str:
    """A LaTeX matrix as a list: the number of its rows, then the entries."""
    rows = [row.replace("&", ",") for row in match[2].split(r"\\") if row.strip()]
    return rf" \{match[1]}matrix({len(rows)},{','.join(rows)})"


# What one token cannot show. 1,234 is one number, but (1,234) is a pair; 0.1\overline{6} is a fraction.
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"^\s*(?i:(?:the )?(?:final )?answer(?: is|:)|an? (?!and\b)(?=[a-z]{3}))|[\s.,;]+$", ""),
    ("½", r"\\frac12 "), ("²", "^2"), ("³", "^3"), ("(?<=[eE^{])[−–]", "-"),
    (r"(?<!\\)sqrt\s*(\d+)|√\s*(\d+)", r"\\sqrt{\1\2}"),
    (r"(?<![\w\\])([A-Za-z])(?:\^\{-1\})?\([^()=<>]*\)\s*=", r"\1="),   # f(2) = 5 names a value
    (r"\b([ap])\.\s?m\b\.?", r"\1m"), (r"\bmph\b", "miles per hour"),
    (r"\b(in|ft|sq|sec|min|hr|oz|lbs?)\.", r"\1"),
    (r"\((\d+)\)_", r"\1_"), (r"_\{\s*\\text\s*\{(\d+)\}\s*\}", r"_{\1}"), (r"\^\s*\{?\s*\\circ\s*\}?", "°"),
    (r"°\s*(?:C\b|F\b|\\text\s*\{\s*[CF]\s*\})", "°"),
    (r"\\(?:text|mathrm|operatorname|mbox|textbf|textit|textrm|textnormal)\s*\{([^{}]*)\}", r' "\1" '),
    (r"\\mathbb\s*\{?R\}?|ℝ", r"(-\\infty,\\infty)"),
    (r"(?<![\d,.(\[])(?<!\\\{)\d{1,3}(?:(?:\{,\}|,?\\[,!]\s?|,)\d{3})+(?!\d|,\d)",
     lambda m: re.sub(r"\D", "", m[0])),
    (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d+)\}", lambda m: "({}/{})".format(
        int(m[1] + m[2] + m[3]) - int("0" + m[1] + m[2]), (10 ** len(m[3]) - 1) * 10 ** len(m[2]))),
    (r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)", r"\1\\frac{\2}{\3}"),       # 3 1/2 is 3.5
    (r"\\begin\{[pbB]?(v?)(?:small)?(?:matrix|array)\}(?:\{[clr|]*\})?(.*?)\\end\{\w*\}", flatten_matrix),
    (r"\\l(floor|ceil)(?![a-z])", r"\\\1("), (r"\\r(?:floor|ceil)(?![a-z])", ")"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|boxed|fbox|math(?:bf|it|cal)|boldsymbol|vec|hat|"
     r"rm|bf|allowbreak|q?quad|angle|triangle)(?![A-Za-z])|\\[()\[\],;:!\s]|~", " "),       # says nothing
    (r"\\(?:[lr]?vert|mid)(?![a-z])", "|"),              # a bar that closes stands behind an operand
    *[(r"\|([^|]*[^|\s({\[,=<>+*/^-])\s*\|", r"\\abs(\1)")] * 3)]
TOKEN = re.compile(r"""\d[\dA-F]*_(?:\{\d+\}|\d)|(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,2}(?!\d))?"""
                   r"""|"[^"]*"|\\[A-Za-z]+|\\.|[A-Za-z]+|\*\*|<=|>=|!=|\.\.\.|\S""")


@functools.lru_cache(maxsize=2 ** 14)                   # a reference is read once for its whole group
def tokenize(text: str) -> tuple[str, ...]:
    """Numbers, operators, \\commands, single letters, and words marked by a leading quote."""
    text = re.sub(r"\s", " ", text)
    printable = len(text) <= MAX_CHARACTERS and text.isprintable()
    require(printable and not re.search(r"\d{61}", text), "not an answer")
    if (text.count("$") - text.count(r"\$")) % 2 == 0:            # $...$ is mathematics, a single $ is money
        text = re.sub(r"(?<!\\)\$", "", text)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    tokens = []
    for token in TOKEN.findall(text):
        quoted = token[0] == '"' and len(token) > 1
        for part in TOKEN.findall(token[1:-1]) if quoted else [token]:
            part = "\\" + part if "\\" + part in WORDS and part != "sec" else part
            if not (part.isascii() and part.isalpha()):
                tokens.append(ALIASES.get(part, part))
            elif part.lower() in ("and", "or"):
                tokens.append(",")
            elif len(part) > 3 or quoted + (part in UNITS) + (len(part) > 1) >= 2:
                tokens += ['"' + part.lower()] if part not in ("an", "the") else []
            elif not (quoted and part == "a"):          # xy = yx, but AB is one name: ABC is not ACB
                tokens += part if part.islower() else [part]
    return tuple(tokens)


class AnswerParser:
    """Recursive descent from tokens to a value. The grammar is closed: the text is read, never evaluated.

    A value is a sympy expression or a structure, a tuple of its kind and its parts: ("()", a, b) and other
    pairs of brackets are ordered tuples or intervals, ("{}", ...) is a set, (",", ...) an unordered list,
    ("=", name, value) a named value or an equation, ("<", a) says a < 0, ("matrix", rows, *entries),
    ("unit", unit, value), ("text", words), (":", a, b). ValueError: not in the grammar.
    """

    def __init__(self, tokens):
        self.tokens, self.depth, self.operators = [*tokens, ""][::-1], 0, OPERATORS
        self.take = self.tokens.pop

    @property
    def next(self) -> str:
        return self.tokens[-1]

    def accept(self, *tokens: str) -> str:
        return self.take() if self.next in tokens else ""

    def bracket(self, opening: str):
        """Separated values up to the closing bracket."""
        values = [self.relation()]
        while self.accept(",", ";", "∪"):
            self.accept(",")                                 # "a, and b"
            values.append(self.relation())
            require(len(values) <= 20, "too many items")
        pair = opening[-1] + self.take()[-1:]
        require(pair in ("()", "(]", "[)", "[]", "{}"), "unbalanced brackets")
        if len(values) == 1 and pair not in ("(]", "[)"):
            return values[0]
        return ("," if opening == "{" else pair, *values)

    def relation(self):
        """x = 5 and x in S name a value; x < 5 is x in (-oo, 5); a chain of equations has to be true."""
        values, marks = [self.quantity()], ""
        while mark := self.accept(*"=∈<>≤≥≠:"):
            marks += mark
            values.append(self.quantity())
        if set(marks) <= {":"}:
            return (":", *values) if marks else values[0]
        if set(marks) <= {"=", "∈"}:
            first, *rest = values if has_symbols(values[0]) else values[::-1]
            require(all(same(rest[0], value) for value in rest[1:]), "a chain of unequal values")
            require(has_symbols(first) or same(first, rest[0]), "a false equation")
            return ("=", first, rest[-1]) if has_symbols(first) else rest[0]
        if set(marks) <= {">", "≥"}:
            values, marks = values[::-1], marks[::-1].translate(str.maketrans(">≥", "<≤"))
        if set(marks) <= {"<", "≤"} and len(values) <= 3:
            open_end = len(values) == 2
            chain, links = ([-sympy.oo, *values, sympy.oo], f"<{marks}<") if open_end else (values, marks)
            for low, name, high, left, right in zip(chain, chain[1:], chain[2:], links, links[1:]):
                if is_name(name) and not has_symbols((low, high)):
                    return ("=", name, ("(["[left == "≤"] + ")]"[right == "≤"], low, high))
        require(len(marks) == 1, "a chain of relations")
        return (marks, OPERATORS["-"][1](*values))

    def quantity(self):
        """Words, or an expression with its unit: money in front, any other behind."""
        if self.next[:1] == '"' and len(self.next) > 2:
            words = []
            while self.next not in ("", ",", ";", ")", "]", "}", r"\}", "="):
                words.append(self.take().strip('"'))
            return ("text", " ".join(words))
        unit = [UNITS[self.take()]] if self.next == "$" else []
        value = self.arithmetic()
        while self.next[:1] == '"' or self.next in ("%", "°") or unit and self.next in ("^", "/"):
            word = self.take().strip('"')
            if word == "^":
                word += str(self.argument())
            elif word == "/":
                unit, word = unit + ["per"], self.take().strip('"')
            if word in SCALES:
                value = multiply(value, SCALES[word])
            else:
                unit.append(UNITS.get(word, word.removesuffix("s")))
        require(not NOT_UNITS & set(unit), "a word that is no unit")
        return ("unit", " ".join(sorted(unit)), value) if unit else value

    def arithmetic(self, level: int = 0):
        """Precedence climbing: an operand, then what binds tighter than `level`; 2: as in sin 2x."""
        self.depth += 1
        require(self.depth <= 40, "nested too deeply")
        if sign := self.accept("+", "-"):
            value = self.arithmetic(max(level, 1))
            value = multiply(-1, value) if sign == "-" else value
        else:
            value = self.atom()
        while True:
            juxtaposed = (self.next.isalpha() or self.next in STARTERS) and not (
                level == 2 and (self.next in FUNCTIONS or self.next in ("(", "[")))
            rank, operation = self.operators.get(self.next, (3 * juxtaposed, multiply))
            if rank <= level:
                self.depth -= 1
                return value
            self.accept(*self.operators)
            value = operation(value, *(() if rank == 5 else [self.arithmetic(1 if rank == 1 else 3)]))

    def atom(self):
        token = self.take()
        if token[:1].isdecimal() or token[:1] == "." and len(token) > 1:
            return self.number(token)
        if token in ("(", "[", "{", r"\{"):
            return self.bracket(token)
        if token in (r"\matrix", r"\vmatrix"):
            return (token[1:], *self.bracket(self.take())[1:])
        if token in COMMANDS:
            return COMMANDS[token](self.argument(), self.argument())
        if token == r"\sqrt":
            root = self.bracket("[") if self.accept("[") else 2
            return node(sympy.Pow, self.argument(), node(sympy.Pow, root, -1))
        if token in FUNCTIONS:
            return self.function(token)
        if token in NUMBERS:
            return NUMBERS[token]
        name = token.strip('"')
        require(name.isalpha() and len(name) < 4 or token in SYMBOLS, "an unknown symbol")
        name += "_" + str(self.argument()) if self.accept("_") else ""
        while self.accept("'"):
            name += "'"
        return sympy.Symbol(name)

    def number(self, token: str):
        if "_" in token:                                     # 52_8, in base 8: a name that nothing else has
            return sympy.Symbol(re.sub("^0+|[{}]", "", token))
        value = sympy.Rational(token)
        if not value.is_Integer or self.next != r"\frac":
            return value
        part = self.atom()                                   # 3\frac12 is 3.5
        mixed = not has_symbols(part) and 0 < MP.re(numeric_value(part, CONSTANTS)) < 1
        return node(sympy.Add if mixed else sympy.Mul, value, part)

    def argument(self):
        """What a \\command takes: a braced group or, as in TeX, the next single digit or symbol."""
        if self.next.isdecimal():
            digits = self.take()
            self.tokens += [digits[1:]] if digits[1:] else []
            return sympy.Integer(digits[0])
        return self.atom()

    def function(self, name: str):
        """\\sin^2 x, \\log_2 8, \\cos 2x: the argument is a bracket or the product that follows."""
        base = self.argument() if name == r"\log" and self.accept("_") else 10
        exponent = self.arithmetic(3) if self.accept("^") else 1
        outer, self.operators = self.operators, OPERATORS | DEGREE
        value = self.atom() if self.next in ("(", "{", "[") else self.arithmetic(2)
        self.operators = outer
        if exponent == -1 and r"\a" + name[1:] in FUNCTIONS:
            return node(FUNCTIONS[r"\a" + name[1:]], value)
        value = node(FUNCTIONS[name], value)
        if name == r"\log":
            value = COMMANDS[r"\frac"](value, node(sympy.log, base))
        return value if exponent == 1 else node(sympy.Pow, value, exponent)


def read(tokens: tuple[str, ...]):
    """The value of an answer; with \\pm in it, the list of its two readings."""
    readings = []
    for plus, minus in ("+-", "-+") if {r"\pm", r"\mp"} & set(tokens) else ("+-",):
        signs = {r"\pm": plus, r"\mp": minus}
        parser = AnswerParser(["{", *(signs.get(token, token) for token in tokens), "}"])
        readings.append(parser.atom())
        require(not parser.next, "text behind the answer")
    if len(readings) == 1:
        return readings[0]
    lists = [v[1:] if isinstance(v, tuple) and v[0] in (",", "{}") else (v,) for v in readings]
    return (",", *dict.fromkeys(lists[0] + lists[1]))


def has_symbols(value) -> bool:
    """Whether a value holds any variable."""
    if isinstance(value, tuple):
        return any(map(has_symbols, value))
    return bool(getattr(value, "free_symbols", ()))


def is_name(value) -> bool:
    """x, AB, a + b or (x, y): what may stand before "=" without being part of the answer; not 2x or x^2."""
    if isinstance(value, tuple):
        return value[0] == "()" and all(map(is_name, value[1:]))
    return has_symbols(value) and not value.atoms(sympy.Number)


def numeric_value(expr, point: dict):
    """Value of an expression at a rational point: a Fraction as long as it is rational, else to 300 digits.

    Every step is bounded, because no operand and no result may exceed MAX_BITS. ValueError if one does.
    """
    if expr.is_Rational:
        return Fraction(expr.p, expr.q)
    if not expr.args:
        return point[expr]
    head, args = type(expr), [numeric_value(arg, point) for arg in expr.args]
    require(head not in TRANSCENDENTAL or bits(args[0]) <= 512, "argument too large")
    small = all(isinstance(arg, Fraction) and arg in range(61) for arg in args)
    require(small or head not in COUNTING, "not small whole numbers")
    value = OPERATIONS[head](*args)
    sizes = [abs(bits(part)) for part in (value.real, value.imag)]     # ln(tan(1 + 10^10 i)) hides a tiny one
    require(MP.isfinite(value) and max(sizes) <= MAX_BITS, "number too large")
    return value


def same_expression(a, b, up_to_factor: bool = False) -> bool:
    """Whether a = b at random points of both signs: exactly where both are rational, else to 200 digits.

    Two expressions of this grammar that agree at six random points agree everywhere. Where some of the values
    are real, only these count: sqrt(1/n) is 1/sqrt(n). `up_to_factor`: a = c b with a constant c will do.
    """
    if {sympy.oo, -sympy.oo} & (a.atoms() | b.atoms()):
        return False                                         # equal infinities were found equal before
    symbols, rng = sorted(a.free_symbols | b.free_symbols, key=str), random.Random(0)
    verdicts, scale = {True: [], False: []}, None            # by "both values are real"
    for signs in ((1,), (-1,), *[(1, -1)] * 4) if symbols else ((1,),):
        point = CONSTANTS | {symbol: Fraction(rng.choice(signs) * (2 * rng.randrange(10 ** 6) + 1), 10 ** 6)
                             for symbol in symbols}
        x, y = numeric_value(a, point), numeric_value(b, point)
        if up_to_factor:
            scale = scale or (x, y)
            if not all(isinstance(value, Fraction) and value for value in scale):
                return False
            x, y = x * scale[1], y * scale[0]
        u, v = MP.convert(x), MP.convert(y)
        exact = isinstance(x, Fraction) and isinstance(y, Fraction)
        equal = x == y if exact else abs(u - v) <= TOLERANCE * max(1, abs(u), abs(v))
        real = max(abs(MP.im(u)), abs(MP.im(v))) < TOLERANCE
        if real and not equal:
            return False
        verdicts[real].append(equal)
    return all(verdicts[True] or verdicts[False])


def same(a, b) -> bool:
    """Equality of two values: structure here, algebra in `same_expression`."""
    if str in (type(a), type(b)):
        return type(a) is type(b) and a == b
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr) and a == b:
        return True                       # never == on anything else: with words in it sympy evaluates them
    kind, other = (value[0] if isinstance(value, tuple) else "" for value in (a, b))
    for mark in ("=", "unit"):                               # x = 5 is 5; 5 cm is 5, but not 5 m
        if (kind == mark) != (other == mark):
            wrapped, value = (a, b) if kind == mark else (b, a)
            return (mark == "unit" or is_name(wrapped[1])) and same(wrapped[2], value)
    if not kind or not other:
        return kind == other and same_expression(a, b)
    if kind == other == "=" and not same(a[1], b[1]):
        return same_expression(*(OPERATORS["-"][1](*value[1:]) for value in (a, b)), up_to_factor=True)
    if len(a) != len(b) or kind != other and {kind, other} not in ({",", "{}"}, {",", "()"}):
        return False
    if "()" in (kind, other) or kind not in (",", "{}"):
        return all(map(same, a[1:], b[1:]))
    rest = list(b[1:])                                       # unordered: strike out one by one
    for value in a[1:]:
        match = next((place for place, candidate in enumerate(rest) if same(value, candidate)), None)
        if match is None:
            return False
        del rest[match]
    return True


@functools.lru_cache(maxsize=2 ** 16)                             # a group repeats its answers
def compare(predicted: str, answer: str) -> str:
    """The outcome of reading both and comparing them: "right", "wrong", "unparsable" or "error"."""
    try:
        left, right = tokenize(predicted), tokenize(answer)
        word, other = ("".join(tokens).replace('"', "").casefold() for tokens in (left, right))
        if left == right != () or word == other and len(word) > 1 and word.isalpha():
            return "right"
        if choice := re.fullmatch(r"\(?([A-Z])\)?", "".join(right)):       # "(C) 12" is choice C
            chosen = re.match(r"\(?([A-Z])[).:]", "".join(left))
            if chosen and not {",", "("} & set(left[2:]):
                return "right" if chosen[1] == choice[1] else "wrong"
        return "right" if same(read(left), read(right)) else "wrong"
    except (ValueError, ZeroDivisionError):
        return "unparsable"
    except Exception:                 # the one fence, for mistakes here or in sympy: counted, never hidden
        return "error"


def verify(predicted: str | None, problem: Problem) -> str:
    """Outcome for the log: "right", "wrong", "no_answer", "unparsable", "timeout", "error" or "unjudged".

    `predicted` is what `extract_answer`, or for code `extract_program`, found in the completion.
    """
    if problem.task in GENERAL:
        return "unjudged"  # by rules
    if not predicted:
        return "no_answer"
    if problem.task == "countdown":
        return "right" if countdown_equal(predicted, problem.numbers, problem.answer) else "wrong"
    if problem.task == "code":
        return run_tests(predicted, problem.tests)
    return compare(predicted[:MAX_CHARACTERS + 1], problem.answer[:MAX_CHARACTERS + 1])


def answers_equal(predicted: str, answer: str) -> bool:
    """Whether two answers in plain text or LaTeX mean the same; False for whatever cannot be read.

    Exact for rationals: 0.333 is not 1/3. A unit, a name ("x =") or money may be missing on one side but not
    differ; tuples and intervals are ordered, sets and lists are not. Never raises; bounded in time by caps,
    without clocks, signals or processes, so it works in threads, in notebooks and on Windows.
    """
    return verify(predicted, Problem("", answer)) == "right"


def countdown_equal(expression: str, numbers: tuple[int, ...], target: str | int) -> bool:
    """Whether `expression` uses each of `numbers` exactly once, with + - * / and brackets, to make `target`.

    Exact (Fraction). "= value" may follow if it is the target. The syntax tree is walked, never evaluated.
    """
    formula, *stated = expression.translate(str.maketrans("x×÷−", "**/-")).split("=")
    if len(expression) > 200 or len(stated) > 1 or re.search(r"[^\d\s+\-*/().]|\*\s*\*|/\s*/", formula):
        return False
    used, operations = [], {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
                            ast.Div: operator.truediv}

    def value(node) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        return operations[type(node.op)](value(node.left), value(node.right))     # KeyError: no such operator

    try:
        result = value(ast.parse(formula.strip(), mode="eval").body)
        return sorted(used) == sorted(numbers) and all(int(x) == result for x in (target, *stated))
    except (SyntaxError, ArithmeticError, ValueError, KeyError, AttributeError, RecursionError, MemoryError):
        return False


def check_references(problems: list[Problem]) -> list[Problem]:
    """The problems no completion could ever solve: the reference does not verify against itself."""
    usable = {"code": lambda problem: problem.tests, **dict.fromkeys(GENERAL, lambda _: True),
              "countdown": lambda problem: problem.numbers and problem.answer.lstrip("-").isdigit()}
    default = lambda problem: verify(problem.answer, problem) == "right"
    return [problem for problem in problems if not usable.get(problem.task, default)(problem)]


def find_answer(completion: str, problem: Problem, lenient: bool = False) -> str | None:
    """What a completion ends in: an answer or, where code is asked for, a program."""
    return extract_program(completion) if problem.task == "code" else extract_answer(completion, lenient)


def grade(completion: str, problem: Problem, lenient: bool = False) -> str:
    """Outcome of a whole completion: `verify` of the answer that it ends in."""
    return verify(find_answer(completion, problem, lenient), problem)


def accuracy_reward(completion: str, problem: Problem) -> float:
    """1 if the final answer matches the reference (code: passes every test), else 0 [R1 2.2.2]."""
    return float(grade(completion, problem) == "right")


def format_reward(completion: str, problem: Problem) -> float:
    """1 if the text is <think> thinking </think> followed by something, each tag once, else 0 [R1 2.2.2].

    Where the prompt ends in a prefilled <think>, pass it in front of the completion.
    """
    parts = re.fullmatch(r"\s*<think>(.*)</think>(.*)", completion, re.DOTALL)
    once = completion.count("<think>") == completion.count("</think>") == 1
    return float(bool(once and parts and parts[1].strip() and parts[2].strip()))


def language_reward(completion: str, problem: Problem, language: str = "en") -> float:
    """Share of the words of the thinking that are in the target language: en | zh [R1 2.3.2, N Eq. 7].

    One CJK ideograph is a word, and so is a run of other letters; numbers and LaTeX are neutral.
    No words at all: 1.0, neutral, as nothing is in another language.
    """
    thinking = (completion.rpartition("</think>")[0] or completion).rpartition("<think>")[2]
    thinking = re.sub(r"\$[^$]*\$|\\[A-Za-z]+|<[^<>\s]*>", " ", thinking)
    words = re.findall(r"[\u3400-\u9fff]|[^\W\d_\u3400-\u9fff]+", thinking)
    script = {"en": "LATIN", "zh": "CJK"}[language]
    in_target = [unicodedata.name(word[0], "").startswith(script) for word in words]
    return sum(in_target) / len(in_target) if in_target else 1.0


def extract_program(completion: str) -> str | None:
    """The last fenced block after the thinking, without its language line."""
    parts = completion.rpartition("</think>")[2].split("```")
    return parts[-2].partition("\n")[2] if len(parts) >= 3 and len(parts) % 2 else None


# Runs in the child. For asserts the program comes first, with an empty standard input; the tests and a
# password are read only when it has ended, from a descriptor it was not told about. So neither leaving early
# nor printing "passed" counts: only the password, written after the last assert, does.
TEST_RUNNER = """
import json, os, runpy, sys
seconds, megabytes, asserts = map(int, sys.argv[1:])
try:                                                # AS last: not every system has it
    import resource
    for name, value in dict(CPU=seconds, FSIZE=1 << 24, CORE=0, NPROC=1024, AS=megabytes << 20).items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
except (ImportError, AttributeError, ValueError, OSError):
    pass
if not asserts:
    runpy.run_path("program.py", run_name="__main__")
else:
    channel = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    names = runpy.run_path("program.py", run_name="program")
    password, *tests = json.loads(channel.read())
    for test in tests:
        exec(test, names)
    sys.stdout.flush()
    os.write(1, password.encode())
    os._exit(0)
"""


def run_contained(program: str, stdin: str, asserts: bool, time_limit_seconds: float, memory_limit_mb: int):
    """(exit status, start of the output) of a program in a child process; status None is a time-out."""
    limits = [str(int(time_limit_seconds) + 1), str(memory_limit_mb), str(int(asserts))]
    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
          tempfile.TemporaryFile() as output):
        with open(os.path.join(folder, "program.py"), "w", encoding="utf-8") as file:
            file.write(program)
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", TEST_RUNNER, *limits],
            cwd=folder, start_new_session=True, close_fds=True,
            env={name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ},    # for Windows
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL)
        try:
            process.communicate(stdin.encode(), timeout=time_limit_seconds)
            status = process.returncode
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                # the whole group: what the program started dies with it
                os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
            process.wait()
        output.seek(0)
        return status, output.read(1 << 20).decode(errors="replace")


def run_tests(program: str, tests: tuple, time_limit_seconds: float = 5.0, memory_limit_mb: int = 512) -> str:
    """Outcome of a program under all its tests: "right", "wrong", "timeout", or "error" if there are none."""
    asserts = [test for test in tests if isinstance(test, str)]
    password = secrets.token_hex(16)
    runs = [(json.dumps([password, *asserts]), True, password)] if asserts else []
    runs += [(test["input"], False, test["output"]) for test in tests if not isinstance(test, str)]
    for stdin, is_assert, expected in runs:
        try:
            status, output = run_contained(program, stdin, is_assert, time_limit_seconds, memory_limit_mb)
        except (OSError, UnicodeError):
            return "error"
        if status is None:
            return "timeout"
        passed = output.endswith(expected) if is_assert else output.split() == expected.split()
        if status != 0 or not passed:
            return "wrong"
    return "right" if runs else "error"


def code_reward(completion: str, problem: Problem, time_limit_seconds: float = 5.0,
                memory_limit_mb: int = 512) -> float:
    """1 if the last fenced program passes all of `problem.tests`, else 0 [R1 2.2.2].

    The program runs in a child process in its own process group and temporary directory, without environment
    or inherited handles, with limits on time and, where the system has them, on memory and output, and its
    group is killed afterwards. This is containment of accidents, not a security boundary: it has the user's
    rights, network included. Against hostile code use a container or a virtual machine.
    """
    program, limits = extract_program(completion), (time_limit_seconds, memory_limit_mb)
    return float(bool(program) and run_tests(program, problem.tests, *limits) == "right")


def judged_part(completion: str, problem: Problem) -> str:
    """What a reward model sees: of a helpful answer its final part, for harmlessness everything [N]."""
    _, closed, final = completion.rpartition("</think>")
    if problem.task == "harmless":
        return completion
    return final.strip() if closed or "<think>" not in completion else ""  # still thinking: no answer


class RewardModel:
    """A preference reward from any sequence classifier with one label, in the place where rules end."""

    def __init__(self, path: str, cfg: Config, device, dtype, untrained: bool = False):
        self.cfg, self.tokenizer = cfg, load_tokenizer(path, "reward_model")
        torch.manual_seed(cfg.seed)  # of a head that is not there yet
        try:
            self.model, loading = load_pretrained(AutoModelForSequenceClassification, path, num_labels=1,
                                                  dtype=dtype, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"reward_model {path!r} cannot be loaded: {reason}") from None
        if loading["missing_keys"] and not untrained:  # transformers would judge by random weights
            raise InputError(f"reward_model {path!r} is no classifier with one label: it lacks "
                             f"{', '.join(sorted(loading['missing_keys']))}; --stage reward trains one")
        self.model.to(device).eval()
        pad = self.tokenizer.pad_token_id
        self.model.config.pad_token_id = self.tokenizer.eos_token_id if pad is None else pad

    def encode(self, completion: str, problem: Problem) -> list[int]:
        """The conversation as the classifier reads it."""
        text = judged_part(completion, problem)
        if self.tokenizer.chat_template:
            turns = [{"role": "user", "content": problem.question}, {"role": "assistant", "content": text}]
            return encode_prompt(self.tokenizer, self.tokenizer.apply_chat_template(turns, tokenize=False))
        ids = encode_prompt(self.tokenizer, self.cfg.template.replace("{question}", problem.question))
        return ids + self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def scores(self, rows: list[list[int]]) -> torch.Tensor:
        """Token ids -> (rows,), float32; padding on the right, where no causal model looks."""
        pad, device = self.model.config.pad_token_id, self.model.device
        ids, lengths = pad_rows(rows, pad).to(device), torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1], device=device) < lengths.to(device)[:, None]
        return self.model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float()

    @torch.no_grad()
    def __call__(self, completions: list[str], problems: list[Problem]) -> list[float]:
        """Scores of completions; only their differences on one question mean anything."""
        rows = [self.encode(*pair) for pair in zip(completions, problems)]
        scores: list[float] = [0.0] * len(rows)
        for part in pack([len(row) for row in rows], self.cfg.micro_batch_tokens):
            for row, value in zip(part, self.scores([rows[row] for row in part]).tolist()):
                scores[row] = value
        return scores


# ------------------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """One step's completions: row b answers prompt b // group_size.

    ids (batch, length): prompt and completion; prompt_tokens, completion_tokens (batch,): their lengths, the
    end token counted; truncated (batch,): no end token within the limit; sample_logprobs (batch, completion):
    noted while sampling; texts: the completions without end token, behind a `<think>` that ended the prompt.
    """

    ids: torch.Tensor
    prompt_tokens: torch.Tensor
    completion_tokens: torch.Tensor
    truncated: torch.Tensor
    sample_logprobs: torch.Tensor
    texts: list[str]
    advantages: torch.Tensor | None = None  # (batch,)
    old_logprobs: torch.Tensor | None = None  # (batch, completion), of π_old
    ref_logprobs: torch.Tensor | None = None  # (batch, completion), of π_ref

    @property
    def completion_mask(self) -> torch.Tensor:
        """(batch, completion), true up to and with the end token; by position, as it may be the pad token."""
        width = self.sample_logprobs.shape[1]
        return torch.arange(width, device=self.ids.device) < self.completion_tokens[:, None]

    def select(self, rows: torch.Tensor) -> "Rollout":
        """The same for some rows, without the columns that only pad."""
        length = int((self.prompt_tokens + self.completion_tokens)[rows].max())
        width = int(self.completion_tokens[rows].max())
        chosen = {name: value[rows] for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        chosen = {name: value[:, : length if name == "ids" else width] if value.dim() == 2 else value
                  for name, value in chosen.items()}
        return Rollout(**chosen, texts=[self.texts[row] for row in rows.tolist()])


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention that repeats no key or value for grouped queries; transformers calls it by its name.

    No mask means causal: padding is on the right, where nobody looks. With one query token, the query heads
    that share a key head become the rows of one small product.
    """
    batch, heads, queries, _ = query.shape
    if attention_mask is None:
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=queries > 1, scale=scaling,
                                                  enable_gqa=heads != key.shape[1])
        return attended.transpose(1, 2), None
    query = query.view(batch, key.shape[1], heads // key.shape[1], -1)
    mask = attention_mask.expand(batch, key.shape[1], query.shape[2], key.shape[2])
    attended = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return attended.reshape(batch, 1, heads, -1), None


AttentionInterface.register("grouped", grouped_attention)


def pick_tokens(logits, uniform, temperature: float, top_p: float = 1.0):
    """Draw from softmax(logits / temperature) by inverting its cumulative sum at `uniform`.

    logits (batch, vocab), uniform (batch,) in [0, 1) -> tokens (batch,) and their log-probabilities (batch,),
    float32, under the full softmax. One number decides a row, so rows cannot disturb each other. Temperature
    0 is greedy, with the log-probabilities of temperature 1.
    """
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens = logprobs.argmax(-1, keepdim=True)
    else:
        probs = logprobs.exp()
        if top_p < 1:
            descending, order = probs.sort(descending=True)
            beyond = descending.cumsum(-1) - descending >= top_p
            probs = torch.zeros_like(probs).scatter(1, order, descending.masked_fill(beyond, 0.0))
        cumulative = probs.cumsum(-1)
        tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
        tokens = tokens.clamp(max=logits.shape[1] - 1)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def head_size(config) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def pad_rows(rows: list[list[int]], pad: int = 0) -> torch.Tensor:
    """Lists of ids -> (rows, longest), padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


class Decoder:
    """The state of cached decoding at fixed addresses: a CUDA graph captured once serves all later rollouts.

    It is also the cache object that transformers' modules write to. The token at position p of a sequence
    lies in slot p of its row, so sequences of different lengths need no padding among keys and values.
    """

    def __init__(self, model, sizes: tuple[int, int, int], stops: list[int], compile: bool):
        device, self.sizes, (rows, max_length, max_completion_tokens) = model.device, sizes, sizes
        shape = (rows, model.config.num_key_value_heads, max_length, head_size(model.config))
        # One tensor a layer: of a single stacked one torch.compile would copy the whole at every write.
        self.keys = [torch.zeros(shape, dtype=model.dtype, device=device) for _ in model.base_model.layers]
        self.values = [torch.zeros_like(key) for key in self.keys]
        self.index = torch.arange(rows, device=device)
        self.row = self.index.clone()  # which completion lies in a row, once others have left
        self.token, self.position = torch.zeros_like(self.index), torch.zeros_like(self.index)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.time = torch.zeros(1, dtype=torch.long, device=device)  # completion tokens drawn so far
        self.ids = torch.zeros(rows, max_completion_tokens, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, max_completion_tokens, device=device)
        self.uniform = torch.zeros_like(self.logprobs)
        self.stop_ids = torch.tensor(stops, device=device)
        self.trunk, self.head = model.base_model, model.get_output_embeddings()
        self.decoding_trunk = torch.compile(self.trunk, dynamic=False) if compile else self.trunk
        if compile:
            torch._dynamo.config.recompile_limit = 64  # one for every (rows, width), as there are graphs
        self.graphs, self.pool = {}, None
        self.share, self.width, self.temperature, self.top_p = 0, 0, 1.0, 1.0  # of the rollout going on

    def get_seq_length(self, *_):
        return 0  # transformers would number positions by it; they are handed over instead

    def update(self, key, value, layer: int, *_, **__):
        """Store the keys and values of new tokens; -> all those their queries may look at."""
        rows = len(key)
        for cache, new in ((self.keys[layer], key), (self.values[layer], value)):
            if self.share:  # prefill: what a prompt needed once is shared out to the rows of its group
                cache[: rows * self.share, :, : new.shape[2]] = new.repeat_interleave(self.share, 0)
            else:
                cache[self.index[:rows], :, self.position[:rows]] = new[:, :, 0]
        if self.share:
            return key, value
        return self.keys[layer][:rows, :, : self.width], self.values[layer][:rows, :, : self.width]

    def prefill(self, ids, prompt_tokens, group_size: int, uniform, temperature: float, top_p: float):
        """One pass over the prompts, ids (prompts, length); draws the first token of every completion."""
        rows = len(ids) * group_size
        self.share, self.temperature, self.top_p = group_size, temperature, top_p
        self.row.copy_(self.index), self.done.zero_(), self.time.zero_()
        self.uniform[:rows, : uniform.shape[1]] = uniform
        self.position[:rows] = prompt_tokens.repeat_interleave(group_size) - 1
        hidden = self.trunk(input_ids=ids, past_key_values=self, use_cache=True).last_hidden_state
        self.share = 0
        logits = self.head(hidden[self.index[: len(ids)], prompt_tokens - 1])
        self.draw(logits.repeat_interleave(group_size, 0))

    def draw(self, logits):
        """Draw the next token of each row and note it."""
        row = self.row[: len(logits)]
        token, logprob = pick_tokens(logits, self.uniform[row, self.time], self.temperature, self.top_p)
        self.ids[row, self.time], self.logprobs[row, self.time] = token, logprob
        self.token[: len(row)] = token
        self.done[: len(row)] |= (token[:, None] == self.stop_ids).any(1)
        self.position[: len(row)] += 1
        self.time += 1

    def decode(self, rows: int):
        """One cached step of the first `rows` rows."""
        position = self.position[:rows, None]
        mask = torch.arange(self.width, device=position.device) <= position
        out = self.decoding_trunk(input_ids=self.token[:rows, None], position_ids=position, use_cache=True,
                                  attention_mask=mask[:, None, None], past_key_values=self)
        self.draw(self.head(out.last_hidden_state[:, 0]))

    def step(self, rows: int, width: int):
        """`decode`; on CUDA replayed from a graph, or thousands of small kernels would wait for Python.

        Rows that have ended and not yet left go on too; what they draw is cut off at the end.
        """
        self.width, key = width, (rows, width, self.temperature, self.top_p)
        if self.token.device.type != "cuda":
            self.decode(rows)
        elif key in self.graphs:
            self.graphs[key].replay()
        else:
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                self.decode(rows)  # the warm-up that a capture needs does this step's work
            current.wait_stream(stream)
            self.graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[key], pool=self.pool):  # records, does not run
                self.decode(rows)
            self.pool = self.graphs[key].pool()

    def drop_ended(self, rows: int, keep: int):
        """Move `keep` of the first `rows` rows to the front, those still going first."""
        order = self.done[:rows].to(torch.int8).argsort(stable=True)[:keep]
        for state in (*self.keys, *self.values, self.row, self.token, self.position, self.done):
            state[:keep] = state[order]


def decoder_for(model, sizes: tuple[int, int, int], stops: list[int], compile: bool) -> Decoder:
    """The model's own decoder, whose graphs read its weights where they lie; a new one if it is too small.

    sizes: rows, max_length, max_completion_tokens.
    """
    decoder = getattr(model, "grpo_decoder", None)
    have = decoder.sizes if decoder else (0, 0, 0)
    if not decoder or any(h < s for h, s in zip(have, sizes)) or decoder.stop_ids.tolist() != stops:
        model.grpo_decoder = decoder = None  # the old one's memory goes first
        model.grpo_decoder = Decoder(model, tuple(map(max, have, sizes)), stops, compile)
    return model.grpo_decoder


@torch.no_grad()
def sample_completions(model, tokenizer, prompts: list[str], *, group_size: int, max_completion_tokens: int,
                       temperature: float = 1.0, top_p: float = 1.0, seed: int = 0,
                       max_rows: int | None = None, compile: bool = False) -> Rollout:
    """Sample `group_size` completions of each prompt -> Rollout of prompts x group_size rows.

    A completion depends on its prompt, its place in the batch and the seed: not on its neighbours, on rows
    that leave once they have ended, or on waves (beyond `max_rows` rows, prompts go one wave after another).
    """
    model.eval()  # no dropout; and no gradient checkpointing, which would switch the cache off
    device, rows, cuda = model.device, len(prompts) * group_size, model.device.type == "cuda"
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    prompt_tokens = torch.tensor([len(ids) for ids in encoded], device=device)
    # Drawn on the CPU, for all rows and steps at once: the same numbers on every device.
    uniform = torch.rand(rows, max_completion_tokens, generator=torch.Generator().manual_seed(seed))
    uniform = uniform.clamp(max=1 - 1e-6).to(device)  # rounding must not pass the end of a cumulative sum

    bucket, check_every, shrink = (256, 16, 0.5) if cuda else (32, 1, 0.9)  # on CUDA every shape is a graph
    per_wave = min(max_rows or rows, rows) // group_size
    max_length = -(-(int(prompt_tokens.max()) + max_completion_tokens) // bucket) * bucket
    stops = sorted(stop_token_ids(model, tokenizer))
    decoder = decoder_for(model, (per_wave * group_size, max_length, max_completion_tokens), stops, compile)
    ids, logprobs = [], []
    for wave in torch.arange(len(prompts), device=device).split(per_wave):
        going, first = len(wave) * group_size, int(wave[0]) * group_size
        here, longest = slice(0, going), int(prompt_tokens[wave].max())
        prompt_ids = pad_rows([encoded[i] for i in wave.tolist()]).to(device)
        decoder.prefill(prompt_ids, prompt_tokens[wave], group_size, uniform[first : first + going],
                        temperature, top_p)
        for t in tqdm(range(1, max_completion_tokens), "sampling", delay=5, leave=False):
            if t % check_every == 0:  # on CUDA a look at `done` waits for the device
                left = going - int(decoder.done[:going].sum())
                if left == 0:
                    break
                if left <= shrink * going:
                    decoder.drop_ended(going, going := int(shrink * going))
            decoder.step(going, -(-(longest + t) // bucket) * bucket)
        ids.append(decoder.ids[here, :max_completion_tokens].clone())
        logprobs.append(decoder.logprobs[here, :max_completion_tokens].clone())

    ids, logprobs = torch.cat(ids), torch.cat(logprobs)
    ended = torch.isin(ids, decoder.stop_ids)
    completion_tokens = torch.where(ended.any(1), ended.int().argmax(1) + 1, max_completion_tokens)
    completions = [row[:n] for row, n in zip(ids.tolist(), completion_tokens.tolist())]
    sequences = [encoded[b // group_size] + completion for b, completion in enumerate(completions)]
    rollout = Rollout(
        pad_rows(sequences).to(device), prompt_tokens.repeat_interleave(group_size), completion_tokens,
        ~ended.any(1), logprobs[:, : int(completion_tokens.max())], texts=[])
    rollout.sample_logprobs = rollout.sample_logprobs.masked_fill(~rollout.completion_mask, 0.0)
    for b, completion in enumerate(completions):
        prefilled = "<think>" if prompts[b // group_size].rstrip().endswith("<think>") else ""
        rollout.texts.append(prefilled + tokenizer.decode([i for i in completion if i not in stops]))
    return rollout


# ------------------------------------------------------------------------------------------------------------
# Log-probabilities
# ------------------------------------------------------------------------------------------------------------


def head_logprobs(head, hidden, targets, temperature: float):
    """hidden (tokens, hidden_size), targets (tokens,) -> log-probabilities, entropies: (tokens,), float32."""
    logits = head(hidden).float() / temperature
    normaliser = logits.logsumexp(-1)
    logprobs = logits.gather(1, targets[:, None])[:, 0] - normaliser
    with torch.no_grad():
        entropy = normaliser - torch.linalg.vecdot(logits.softmax(-1), logits)
    return logprobs, entropy


def token_logprobs(model, rollout: Rollout, temperature: float, chunk_tokens: int = 2048,
                   return_entropy: bool = False):
    """log π(o_t | q, o_<t) of every completion token, at the temperature of sampling.

    -> (batch, completion) float32, 0 in padding; with `return_entropy` also the entropy of each distribution,
    in nats. The logits of only one chunk of tokens exist at a time, in the backward pass too: those of 16,000
    tokens and 152,000 words would take 10 GB, several times over.
    """
    mask, head = rollout.completion_mask, model.get_output_embeddings()
    row, t = mask.nonzero(as_tuple=True)
    place = rollout.prompt_tokens[row] + t  # of the token; the position before it predicts it
    hidden = model.base_model(input_ids=rollout.ids, use_cache=False).last_hidden_state[row, place - 1]
    chunks = [checkpoint(head_logprobs, head, h, target, temperature, use_reentrant=False)
              for h, target in zip(hidden.split(chunk_tokens), rollout.ids[row, place].split(chunk_tokens))]
    blank = torch.zeros(mask.shape, device=mask.device)
    logprobs, entropy = (blank.index_put((row, t), torch.cat(values)) for values in zip(*chunks))
    return (logprobs, entropy) if return_entropy else logprobs


# ------------------------------------------------------------------------------------------------------------
# Advantages and loss
# ------------------------------------------------------------------------------------------------------------


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum over all processes that train together (torchrun); without them, the value itself."""
    if dist.is_initialized():
        dist.all_reduce(value := value.clone())
    return value


def group_advantages(rewards: torch.Tensor, scale: bool = True) -> torch.Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4) within each group [R1 Eq. 3]; (prompts, group_size) -> same.

    The standard deviation is the population's. Without `scale`, no division [DrGRPO]. Where all rewards are
    equal A is exactly 0: what rounding leaves of their differences must not be blown up.
    """
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (rewards.std(1, correction=0, keepdim=True) + 1e-4)
    flat = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True) < 1e-6
    return advantages.masked_fill(flat, 0.0)


def loss_weights(completion_mask, average: str = "sequence", max_completion_tokens: int = 0) -> torch.Tensor:
    """The weight of each token in the loss of one update; (batch, completion) -> the same shape.

    sequence: 1 / (B |o_i|) [GRPO]; token: 1 / Σ|o_i| [DAPO]; constant: 1 / (B L_max) [DrGRPO], where B counts
    the completions with a token in the mask. Of the whole update, so that micro-batches change nothing.
    """
    if average == "constant" and not max_completion_tokens:
        raise ValueError("the constant average needs max_completion_tokens")
    mask = completion_mask.float()
    tokens = mask.sum(1, keepdim=True)
    completions = sum_over_ranks((tokens > 0).sum()).clamp(min=1)
    if average == "sequence":
        return mask / (completions * tokens.clamp(min=1))
    all_tokens = sum_over_ranks(tokens.sum()).clamp(min=1)
    return mask / (all_tokens if average == "token" else completions * max_completion_tokens)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, completion_mask, weights=None, *,
              clip_eps: float = 0.2, clip_eps_high: float | None = None, kl_coef: float = 0.0):
    """-[R1 Eq. 1], token by token: the weighted sum of β KL - min(ρ A, clip(ρ, 1-ε, 1+ε) A).

    All (batch, completion) but advantages, (batch,); weights as from `loss_weights`, by default its default.
    -> the loss, and sums over tokens of kl, clipped (the clip cuts the gradient), ratio, tokens; and max_kl.
    """
    weights = loss_weights(completion_mask) if weights is None else weights
    # Log-ratios are zeroed in the padding before exp: after it, 0 x inf would be NaN in the backward pass.
    log_ratio = (logprobs - old_logprobs).masked_fill(~completion_mask, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()  # ρ = π_θ / π_old
    clipped_ratio = ratio.clamp(1 - clip_eps, 1 + (clip_eps if clip_eps_high is None else clip_eps_high))
    surrogate = torch.minimum(ratio * advantages[:, None], clipped_ratio * advantages[:, None])
    kl = torch.zeros_like(ratio)
    if kl_coef:
        log_ref_ratio = (ref_logprobs - logprobs).masked_fill(~completion_mask, 0.0).clamp(-20, 20)
        kl = log_ref_ratio.exp() - log_ref_ratio - 1  # [R1 Eq. 2], estimates KL(π_θ || π_ref), never below 0
    loss = (weights * (kl_coef * kl - surrogate)).sum()
    clipped = completion_mask & (surrogate < ratio * advantages[:, None])
    sums = dict(kl=kl, clipped=clipped, ratio=ratio * completion_mask, tokens=completion_mask)
    stats = {name: float(value.detach().sum()) for name, value in sums.items()}
    return loss, {**stats, "max_kl": float(kl.detach().max())}


# ------------------------------------------------------------------------------------------------------------
# Optimiser
# ------------------------------------------------------------------------------------------------------------


class MasterAdamW:
    """AdamW on float32 master weights, moments and gradients beneath weights of any type.

    bfloat16 has 8 significant bits, so a step of 1e-6 on a weight of 0.02 is rounded away, every time. The
    masters add such steps up; the model holds their rounded copies. A float32 weight is its own master.
    """

    def __init__(self, model, learning_rate: float):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.weights]
        self.adamw = torch.optim.AdamW(self.masters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0,
                                       fused=model.device.type == "cuda")
        self.moved = 1.0  # share of the weights that the last step changed, after rounding

    def state_dict(self) -> dict:
        """AdamW's state, and the masters where they are not the weights themselves."""
        return dict(adamw=self.adamw.state_dict(), masters=[master for _, master in self.rounded()])

    def load_state_dict(self, state: dict):
        """The counterpart of `state_dict`; the weights are loaded with the model."""
        self.adamw.load_state_dict(state["adamw"])
        for (_, master), saved in zip(self.rounded(), state["masters"], strict=True):
            master.copy_(saved)

    def rounded(self):
        """The (weight, master) pairs that are not one and the same."""
        return [(w, master) for w, master in zip(self.weights, self.masters) if w is not master]

    def accumulate(self):
        """After a micro-batch's backward pass: add its gradients up in float32, free the rounded ones."""
        for weight, master in self.rounded():
            if weight.grad is not None:
                master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                weight.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """Clip, step, round, forget the gradients -> their norm before the clip. If not finite: no step."""
        self.accumulate()
        for master in self.masters if dist.is_initialized() else ():
            dist.all_reduce(master.grad)  # a sum: the loss weights count the tokens of all processes
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm))
        if math.isfinite(norm):
            self.adamw.param_groups[0]["lr"] = learning_rate
            self.adamw.step()
            moved = [(weight.copy_(master) != was).sum() for weight, master in self.rounded()
                     for was in [weight.clone()]]  # copied in place: CUDA graphs read weights where they lie
            self.moved = float(sum(moved)) / sum(w.numel() for w, _ in self.rounded()) if moved else 1.0
        self.adamw.zero_grad()
        return norm


# ------------------------------------------------------------------------------------------------------------
# Train
# ------------------------------------------------------------------------------------------------------------

REFLECTION = re.compile(  # the ten words of [N, supplement, Fig. 9]; 等 is wait, 但 is but
    r"\b(?:wait|mistake|however|but|retry|error|verify|wrong|evaluate|check)\b|等|但", re.IGNORECASE)


def mean(values) -> float:
    """Arithmetic mean of numbers, 0 of none; None is no number."""
    values = [float(value) for value in values if value is not None]
    return sum(values) / len(values) if values else 0.0


def max_over_ranks(value):
    """The largest of what the processes hold."""
    values = [value] * processes()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return max(values)


def over_ranks(metrics: dict) -> dict:
    """A step's metrics of all processes as one: the loss, rates and counts add up, the rest is averaged."""
    if not dist.is_initialized():
        return metrics
    parts: list[dict] = [{}] * processes()
    dist.all_gather_object(parts, metrics)
    added = {name for name in metrics if name == "loss" or name.endswith("per_second")}
    floats = {name for part in parts for name, value in part.items() if isinstance(value, float)}
    held = {name: [part[name] for part in parts if name in part] for name in floats}  # some may lack a part
    merged = {name: sum(values) / (1 if name in added else len(values)) for name, values in held.items()}
    outcomes = sum((Counter(part["outcomes"]) for part in parts), Counter())
    max_kl = max(part.get("max_kl", 0.0) for part in parts)
    return {**metrics, **merged, "outcomes": dict(outcomes), "max_kl": max_kl}


def share_of_rank(batch: list) -> list:
    """This process's part of the prompts of a step; each process takes the same number."""
    size = len(batch) // processes()
    return batch[rank() * size :][:size]


def sample_for(model, tokenizer, problems: list[Problem], cfg: Config, group_size: int, seed: int,
               temperature: float | None = None, top_p: float = 1.0) -> Rollout:
    """`sample_completions` for problems, with the settings of a run; temperature None is that of training."""
    prompts = [render_prompt(tokenizer, problem.question, cfg) for problem in problems]
    return sample_completions(
        model, tokenizer, prompts, group_size=group_size, max_completion_tokens=cfg.max_completion_tokens,
        temperature=cfg.temperature if temperature is None else temperature, top_p=top_p, seed=seed,
        max_rows=cfg.max_rows, compile=cfg.compile)


def score(rollout: Rollout, batch: list[Problem], cfg: Config, reward_model=None):
    """-> rewards (prompts, group_size), their parts by name, each (batch,), and the outcomes, counted.

    Rules judge what has a reference, the reward model the rest [N Eq. 8-10]; None: a part does not apply.
    """
    group_size = len(rollout.texts) // len(batch)
    rows = [(text, batch[b // group_size]) for b, text in enumerate(rollout.texts)]
    outcomes = [grade(*row) for row in rows]
    ruled = [outcome != "unjudged" for outcome in outcomes]
    parts = {"accuracy": [float(outcome == "right") if rule else None
                          for outcome, rule in zip(outcomes, ruled)],
             "format": [format_reward(*row) for row in rows]}
    if cfg.language_weight:
        parts["language"] = [language_reward(*row, cfg.language) for row in rows]
    if not all(ruled):
        scores = iter(reward_model(*zip(*(row for row, rule in zip(rows, ruled) if not rule))))
        parts["preference"] = [None if rule else next(scores) for rule in ruled]
    rewards = sum(getattr(cfg, f"{name}_weight") * torch.tensor([value or 0.0 for value in part])
                  for name, part in parts.items())
    return rewards.view(len(batch), group_size), parts, Counter(outcomes)


def pack(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Rows by falling length, in batches of `max_tokens` tokens at most, padding included."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def micro_batches(rollout: Rollout, max_tokens: int) -> list[torch.Tensor]:
    """The rows of a rollout, packed."""
    lengths = (rollout.prompt_tokens + rollout.completion_tokens).tolist()
    return [torch.tensor(batch, device=rollout.ids.device) for batch in pack(lengths, max_tokens)]


@torch.no_grad()
def score_logprobs(model, rollout: Rollout, cfg: Config) -> torch.Tensor:
    """`token_logprobs` of a whole rollout, micro-batch by micro-batch: (batch, completion)."""
    logprobs = torch.zeros_like(rollout.sample_logprobs)
    for rows in micro_batches(rollout, cfg.micro_batch_tokens):
        part = token_logprobs(model, rollout.select(rows), cfg.temperature, cfg.logits_chunk_tokens)
        logprobs[rows, : part.shape[1]] = part
    return logprobs


def update_policy(policy, optimizer: MasterAdamW, rollout: Rollout, cfg: Config, learning_rate: float):
    """One optimizer step on these completions -> a dict: sums over tokens, the loss, the gradient's norm."""
    policy.train()
    in_loss = rollout.completion_mask & ~(rollout.truncated[:, None] & cfg.mask_truncated)
    weights = loss_weights(in_loss, cfg.loss_average, cfg.max_completion_tokens)
    sums: dict[str, float] = {}
    for rows in micro_batches(rollout, cfg.micro_batch_tokens):
        part = rollout.select(rows)
        width = part.sample_logprobs.shape[1]
        logprobs, entropy = token_logprobs(policy, part, cfg.temperature, cfg.logits_chunk_tokens, True)
        loss, stats = grpo_loss(
            logprobs, part.old_logprobs, part.ref_logprobs, part.advantages, in_loss[rows, :width],
            weights[rows, :width], clip_eps=cfg.clip_eps, clip_eps_high=cfg.clip_eps_high,
            kl_coef=cfg.kl_coef)
        loss.backward()
        optimizer.accumulate()
        gap = (logprobs.detach() - part.sample_logprobs).abs()[part.completion_mask].sum()
        stats.update(loss=loss.item(), entropy=entropy.sum().item(), sampler_gap=gap.item(),
                     all_tokens=int(part.completion_tokens.sum()))
        max_kl = max(sums.pop("max_kl", 0.0), stats.pop("max_kl"))
        sums = {name: sums.get(name, 0.0) + value for name, value in stats.items()} | {"max_kl": max_kl}
    return {**sums, "grad_norm": optimizer.step(learning_rate, cfg.max_grad_norm), "moved": optimizer.moved}


def peak_gb(device: torch.device) -> float:
    """GB that lay on a GPU at most since the last call; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def batch_of_problems(problems: list[Problem], step: int, cfg: Config) -> list[Problem]:
    """The questions of a step (from 1): the next ones in an order that every epoch shuffles anew.

    A function of seed and step alone: a run that is resumed needs no other memory of its place in the data.
    """
    epochs = {}
    for place in range((step - 1) * cfg.prompts_per_step, step * cfg.prompts_per_step):
        epochs.setdefault(place // len(problems), []).append(place % len(problems))
    batch = []
    for epoch, places in epochs.items():
        order = random.Random(f"{cfg.seed}/{epoch}").sample(problems, len(problems))
        batch += [order[place] for place in places]
    return batch


def recompute_activations(policy, cfg: Config):
    """Switch gradient checkpointing on, if it is wanted; it acts in training mode only."""
    if cfg.gradient_checkpointing:  # older transformers know it by its second name
        getattr(policy, "activation_checkpointing_enable", policy.gradient_checkpointing_enable)(
            {"use_reentrant": False})


def train_grpo(policy, tokenizer, problems, cfg: Config, after_step=None, state=None, reward_model=None):
    """Group Relative Policy Optimization [GRPO Algorithm 1], [R1 2.2.1]. Changes `policy` in place.

    `problems` is a list, or a function that gives the list of a step.
    `after_step(metrics, rollout, batch, get_state)` is called after every step and ends the training by
    returning True. get_state() is what a later call takes as `state` to go on exactly there; all that is
    random is drawn from (seed, step), so no generator is in it; its tensors are live: save or copy them.
    Raises RunError after three steps in a row with a gradient that is not finite.
    """
    optimizer = MasterAdamW(policy, cfg.learning_rate)
    policy.grpo_decoder = None  # not to be copied
    ref_model = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_coef else None  # π_ref
    recompute_activations(policy, cfg)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        if ref_model:
            ref_model.load_state_dict(state["ref_model"])
    unusable = 0
    for step in range(state["step"] + 1 if state else 1, cfg.steps + 1):
        began, seed = time.perf_counter(), cfg.seed * 1_000_003 + step
        pool = problems(step) if callable(problems) else problems
        batch = share_of_rank(batch_of_problems(pool, step, cfg))  # q ~ P(Q)
        # o_1 ... o_G ~ π_old(. | q); each process draws its own
        rollout = sample_for(policy, tokenizer, batch, cfg, cfg.group_size, seed + 10**9 * rank())
        sample_seconds, sample_gb = time.perf_counter() - began, peak_gb(policy.device)
        rewards, parts, outcomes = score(rollout, batch, cfg, reward_model)
        rollout.advantages = group_advantages(rewards, cfg.scale_advantages).flatten().to(policy.device)
        started = time.perf_counter()
        # In float32 the sampler's numbers are the update's to 1e-5; in bfloat16 kernels round differently.
        rollout.old_logprobs = (rollout.sample_logprobs if policy.dtype == torch.float32
                                else score_logprobs(policy, rollout, cfg))
        rollout.ref_logprobs = score_logprobs(ref_model, rollout, cfg) if ref_model else None

        learning_rate = cfg.learning_rate * min(1.0, step / max(1, cfg.warmup_steps))
        order = torch.randperm(len(rollout.texts), generator=torch.Generator().manual_seed(seed))
        updates = [update_policy(policy, optimizer, rollout.select(rows), cfg, learning_rate)
                   for rows in order.to(policy.device).chunk(cfg.updates_per_rollout)]
        if ref_model and cfg.ref_every and step % cfg.ref_every == 0:
            ref_model.load_state_dict(policy.state_dict())

        unusable = 0 if all(math.isfinite(update["grad_norm"]) for update in updates) else unusable + 1
        metrics = step_metrics(step, rollout, rewards, parts, outcomes, updates, sample_seconds,
                               time.perf_counter() - started)
        metrics.update(sample_peak_gb=sample_gb, update_peak_gb=peak_gb(policy.device),
                       step_seconds=time.perf_counter() - began)
        metrics = over_ranks(metrics)
        get_state = lambda: dict(step=step, optimizer=optimizer.state_dict(),  # noqa: E731
                                 ref_model=ref_model.state_dict() if ref_model else None)
        if after_step and after_step(metrics, rollout, batch, get_state):
            return
        if unusable == 3:
            raise RunError("in three steps in a row gradients were not finite; lower learning_rate, or go "
                           "back to a checkpoint from before with --resume; the batches were kept beside it")


def step_metrics(step, rollout, rewards, parts, outcomes, updates, sample_seconds, update_seconds) -> dict:
    """A step in numbers; the README's glossary explains each."""
    total = {name: sum(update[name] for update in updates) for name in updates[0]}
    tokens = int(rollout.completion_tokens.sum())
    in_loss, all_tokens = max(1, total["tokens"]), max(1, total["all_tokens"])
    return dict(
        step=step, reward=float(rewards.mean()), **{name: mean(part) for name, part in parts.items()},
        mean_tokens=tokens / len(rollout.texts), truncated=mean(rollout.truncated),
        dead_groups=mean(rewards.amax(1) - rewards.amin(1) < 1e-6),
        reflection=mean(bool(REFLECTION.search(text)) for text in rollout.texts),
        loss=mean(u["loss"] for u in updates), grad_norm=mean(u["grad_norm"] for u in updates),
        kl=total["kl"] / in_loss, max_kl=max(u["max_kl"] for u in updates),
        moved=mean(u["moved"] for u in updates), ratio=total["ratio"] / in_loss,
        clip_fraction=total["clipped"] / in_loss, entropy=total["entropy"] / all_tokens,
        sampler_gap=updates[0]["sampler_gap"] / max(1, updates[0]["all_tokens"]),
        outcomes=dict(outcomes), sample_seconds=sample_seconds, update_seconds=update_seconds,
        sample_tokens_per_second=tokens / sample_seconds, update_tokens_per_second=tokens / update_seconds)


def encode_examples(tokenizer, examples: list[Problem], cfg: Config, device) -> Rollout:
    """Given completions in the form of sampled ones; those beyond max_completion_tokens are left out."""
    sequences, prompt_tokens, texts = [], [], []
    for example in examples:
        prompt = render_prompt(tokenizer, example.question, cfg)
        text = example.completion.removeprefix("<think>" if prompt.rstrip().endswith("<think>") else "")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(ids) <= cfg.max_completion_tokens:
            head = encode_prompt(tokenizer, prompt)
            sequences.append(head + ids), prompt_tokens.append(len(head)), texts.append(text)
    if len(sequences) < len(examples):
        show(f"{len(examples) - len(sequences)} of {len(examples)} examples are longer than "
             f"max_completion_tokens ({cfg.max_completion_tokens}) and left out")
    if not sequences:
        raise InputError(f"none of the {len(examples)} completions in data has at most max_completion_tokens "
                         f"{cfg.max_completion_tokens} tokens; raise that")
    heads = torch.tensor(prompt_tokens, device=device)
    lengths = torch.tensor([len(row) for row in sequences], device=device) - heads
    return Rollout(pad_rows(sequences).to(device), heads, lengths, lengths < 0,  # none is truncated
                   torch.zeros(len(texts), int(lengths.max()), device=device), texts)


def sft_schedule(cfg: Config, count: int):
    """The batches of supervised training, (rows, learning_rate), each a shuffled part of `count` examples.

    The learning rate falls along a cosine to a tenth [N], by epochs or max_seconds, whichever end first.
    """
    began, done = time.perf_counter(), 0
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + epoch)
        for rows in torch.randperm(count, generator=generator).split(cfg.sft_batch_size):
            progress = done / count / cfg.sft_epochs
            if cfg.max_seconds:
                progress = max(progress, max_over_ranks(time.perf_counter() - began) / cfg.max_seconds)
            if progress >= 1 and done:
                return
            done += len(rows)
            if len(rows) >= processes():
                yield rows, cfg.sft_learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def fit(model, cfg: Config, count: int, batch_loss) -> list[float]:
    """The loop of supervised training, in place -> the loss of every update.

    batch_loss(rows) gives the losses of an update micro-batch by micro-batch; together they are its loss.
    """
    optimizer, losses = MasterAdamW(model, cfg.sft_learning_rate), []
    recompute_activations(model, cfg)
    model.train()
    for rows, learning_rate in tqdm(sft_schedule(cfg, count), "supervised", delay=2, leave=False):
        total = torch.zeros(())
        for loss in batch_loss(rows):
            loss.backward()
            optimizer.accumulate()
            total += loss.detach().cpu()
        losses.append(float(sum_over_ranks(total.to(model.device))))
        if not math.isfinite(losses[-1]):
            raise RunError(f"the loss of update {len(losses)} is not finite; lower sft_learning_rate")
        optimizer.step(learning_rate, cfg.max_grad_norm)
    model.eval()
    return losses


def train_sft(policy, tokenizer, examples: list[Problem], cfg: Config) -> list[float]:
    """Supervised fine-tuning in place [R1 2.3.1, 2.3.3, 2.4] -> the loss of every update.

    -log π of the tokens of the examples' completions, the end token too, a mean over those of the update.
    Prompts are given, not learned.
    """
    data = encode_examples(tokenizer, examples, cfg, policy.device)

    def batch_loss(rows):
        batch = data.select(share_of_rank(rows.to(policy.device)))
        weights = loss_weights(batch.completion_mask, "token")
        for part in micro_batches(batch, cfg.micro_batch_tokens):
            logprobs = token_logprobs(policy, batch.select(part), 1.0, cfg.logits_chunk_tokens)
            yield -(weights[part, : logprobs.shape[1]] * logprobs).sum()

    return fit(policy, cfg, len(data.texts), batch_loss)


def bradley_terry_loss(chosen, rejected):
    """-log σ(r_chosen - r_rejected), a mean over pairs; both (pairs,). σ(difference) is P(chosen wins)."""
    return -F.logsigmoid(chosen - rejected).mean()


def train_reward_model(reward_model: RewardModel, pairs: list[Problem], cfg: Config) -> list[float]:
    """Fit a reward model to preferences [R1 2.3.4, N] in place -> the loss of every update."""
    encoded = [[reward_model.encode(text, pair) for text in (pair.completion, pair.rejected)]
               for pair in pairs]

    def batch_loss(rows):
        both = [encoded[row] for row in rows]
        for part in pack([max(map(len, pair)) for pair in both], cfg.micro_batch_tokens // 2):
            scores = reward_model.scores([both[i][side] for side in (0, 1) for i in part])
            yield bradley_terry_loss(*scores.chunk(2)) * (len(part) / len(rows))

    return fit(reward_model.model, cfg, len(pairs), batch_loss)


def fault(completion: str, truncated: bool, problem: Problem, cfg: Config) -> str:
    """Why a completion is no example to learn from [R1 2.3.3]; empty if it is one, or all are wanted."""
    if not cfg.filter_samples:
        return ""
    if truncated:
        return "truncated"
    if grade(completion, problem) != "right":
        return "not right"
    if format_reward(completion, problem) < 1:
        return "unreadable"
    return "mixed language" if language_reward(completion, problem, cfg.language) < 1 else ""


def rejection_sample(model, tokenizer, problems: list[Problem], cfg: Config):
    """Completions of a checkpoint that are worth learning from [R1 2.3.3] -> examples, and a count of fates.

    Of rejection_samples completions of each problem at most keep_per_problem stay, no text twice.
    """
    examples, fates, k = [], Counter(), cfg.rejection_samples
    starts = range(0, len(problems), cfg.prompts_per_step)
    for first in tqdm(starts, "rejection sampling", delay=2, leave=False):
        batch = problems[first : first + cfg.prompts_per_step]
        rollout = sample_for(model, tokenizer, batch, cfg, k, cfg.seed * 1_000_003 + first)
        truncated = rollout.truncated.tolist()  # at once: on a GPU each look at one row would wait
        for i, problem in enumerate(batch):
            kept: list[str] = []
            for row in range(i * k, i * k + k):
                text = rollout.texts[row]
                fate = (fault(text, truncated[row], problem, cfg)
                        or "duplicate" * (text in kept)
                        or "enough of its problem" * (len(kept) == cfg.keep_per_problem) or "kept")
                fates[fate] += 1
                kept += [text] * (fate == "kept")
            examples += [dataclasses.replace(problem, completion=text) for text in kept]
    return examples, fates


def majority_vote(predictions: list, equal=answers_equal):
    """The answer given most often, equal ones counted as one; None has no vote; a tie goes to the first."""
    ballots: list[list] = []
    for predicted in predictions:
        if predicted is not None:
            same = next((ballot for ballot in ballots if equal(predicted, ballot[0])), None)
            same.append(predicted) if same else ballots.append([predicted])
    return max(ballots, key=len)[0] if ballots else None


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, c of them right, hold a right one [PASS Eq. 1]."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def confidence_interval(values: list[float]) -> list[float]:
    """95 % interval of a mean, from one value a problem: its samples are no independent evidence."""
    m, n = mean(values), len(values)
    half_width = 1.96 * (sum((v - m) ** 2 for v in values) / max(1, n - 1) / n) ** 0.5 if n > 1 else 1.0
    half_width = half_width or 3 / n  # all alike: the rule of three
    return [max(0.0, m - half_width), min(1.0, m + half_width)]


def same_text(a: str, b: str) -> bool:
    """Equality of Countdown expressions: that two make the same number is no agreement on how."""
    return a.split() == b.split()


def evaluate(model, tokenizer, problems: list[Problem], cfg: Config) -> dict:
    """Sampled accuracy as in the paper [R1 3]: pass@1 over k completions a problem, and what goes with it."""
    k = cfg.eval_samples
    rollout = sample_for(model, tokenizer, problems, cfg, k, cfg.seed, cfg.eval_temperature, cfg.eval_top_p)
    rows = [(text, problems[b // k]) for b, text in enumerate(rollout.texts)]
    right = [float(grade(*row) == "right") for row in rows]
    groups = [slice(i * k, (i + 1) * k) for i in range(len(problems))]
    per_problem, tokens = [mean(right[group]) for group in groups], rollout.completion_tokens.tolist()
    votes = [majority_vote([find_answer(*row) for row in rows[group]],
                           answers_equal if problem.task == "math" else same_text)
             for group, problem in zip(groups, problems)]
    return dict(
        pass_at_1=mean(right), pass_at_1_ci95=confidence_interval(per_problem),
        maj_at_k=mean(verify(vote, problem) == "right" for vote, problem in zip(votes, problems)),
        pass_at_k=mean(pass_at_k(k, round(k * share), k) for share in per_problem),
        k=k, problems=len(problems),
        lenient_accuracy=mean(grade(*row, lenient=True) == "right" for row in rows),
        format_rate=mean(format_reward(*row) for row in rows),
        language=mean(language_reward(*row, cfg.language) for row in rows),
        truncated_rate=mean(rollout.truncated),
        mean_tokens=mean(tokens), tokens_right=mean(n for n, r in zip(tokens, right) if r),
        tokens_wrong=mean(n for n, r in zip(tokens, right) if not r),
        reflection_rate=mean(bool(REFLECTION.search(text)) for text in rollout.texts),
        reflections=mean(len(REFLECTION.findall(text)) for text in rollout.texts))


def win_rate(model, tokenizer, pairs: list[Problem], cfg: Config, reward_model: RewardModel) -> float:
    """Probability, by the reward model, that a sampled reply is preferred to the good one of its pair.

    A judge that also gave the reward can be fooled by the policy: read the replies before you believe this.
    """
    k = cfg.eval_samples
    rollout = sample_for(model, tokenizer, pairs, cfg, k, cfg.seed, cfg.eval_temperature, cfg.eval_top_p)
    ours = torch.tensor(reward_model(rollout.texts, [pair for pair in pairs for _ in range(k)]))
    theirs = torch.tensor(reward_model([pair.completion for pair in pairs], pairs))
    return float((ours - theirs.repeat_interleave(k)).sigmoid().mean())


# ------------------------------------------------------------------------------------------------------------
# Stages
#
# The first five do one thing each; r1 and distill are rows of these, each in a folder of its own.
# ------------------------------------------------------------------------------------------------------------


def stage_zero(cfg: Config, run: "Run"):
    """R1-Zero [R1 2.2] if --model is a base model: reinforcement learning, with no example of reasoning.

    The same is R1's second stage on the model of the first, and its fourth with general_data [R1 2.3].
    """
    setup = prepare(cfg, run)
    cfg, tokenizer, policy, state = setup.cfg, setup.tokenizer, setup.policy, setup.state
    if not state:
        run.facts["before"] = setup.evaluate()
        run.log_evaluation(0, run.facts["before"])
    elif (run.path / "summary.json").exists() and (
            state["step"] == cfg.steps or run.facts["train_seconds"] >= (cfg.max_seconds or math.inf)):
        return show(f"{run.path} is finished; give more --steps to go on with it, if its time is not over")
    length = max(len(setup.problems), len(setup.general))
    mixed = [problem for pool in (setup.problems, setup.general)  # half and half
             for problem in itertools.islice(itertools.cycle(pool), length)]
    bar = tqdm(total=None if cfg.max_seconds else cfg.steps, initial=state["step"] if state else 0,
               desc="GRPO", disable=rank() > 0 or None)

    def after_step(metrics, rollout, batch, get_state):
        step = metrics["step"]
        run.log_step(metrics, rollout, batch)
        bar.update()
        if cfg.preference_steps and step == cfg.steps - cfg.preference_steps:
            show("          from here on half of the questions are general ones, and the reward model judges")
        if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps:
            if run.log_evaluation(step, setup.evaluate()) and rank() == 0:
                save_model(policy, tokenizer, run.path / "best")
        run.stopped_by = max_over_ranks(run.stopped_by)
        run.facts["train_seconds"] = run.facts.get("train_seconds", 0.0) + metrics["step_seconds"]
        over = max_over_ranks(run.facts["train_seconds"] >= (cfg.max_seconds or math.inf))
        if (run.stopped_by or over or step % cfg.save_every == 0 or step == cfg.steps) and rank() == 0:
            run.save(policy, tokenizer, get_state())
        return run.stopped_by or over

    with bar, run.stoppable():
        train_grpo(policy, tokenizer, lambda step: mixed if step > cfg.steps - cfg.preference_steps
                   else setup.problems, cfg, after_step, state, setup.reward_model)
    if run.stopped_by:
        show(f"saved; go on with: {run.again}")
        sys.exit(128 + run.stopped_by)
    run.facts["after"] = setup.evaluate()
    if rank() == 0:
        save_model(policy, tokenizer, run.path / "final")
        run.finish()


def stage_sft(cfg: Config, run: "Run"):
    """Supervised training on the completions in --data: cold start, rejection sampling's, a teacher's."""
    setup = prepare(cfg, run)
    run.facts["before"], began = setup.evaluate(), time.perf_counter()
    losses = train_sft(setup.policy, setup.tokenizer, setup.problems, setup.cfg)
    run.facts.update(train_seconds=time.perf_counter() - began, examples=len(setup.problems),
                     updates=len(losses), first_loss=losses[0], last_loss=losses[-1])
    run.facts["after"] = setup.evaluate()
    if rank() == 0:
        save_model(setup.policy, setup.tokenizer, run.path / "final")
        run.finish()


def stage_reward(cfg: Config, run: "Run"):
    """A reward model from the preference pairs in --data [R1 2.3.4]; --model is what it starts from."""
    setup = prepare(cfg, run)
    judge = setup.reward_model
    losses = train_reward_model(judge, setup.problems, setup.cfg)
    won = [good > bad for good, bad in zip(judge([p.completion for p in setup.held_out], setup.held_out),
                                           judge([p.rejected for p in setup.held_out], setup.held_out))]
    run.facts.update(pairs=len(setup.problems), first_loss=losses[0], last_loss=losses[-1],
                     held_out_pairs=len(won), held_out_accuracy=mean(won))
    save_model(judge.model, judge.tokenizer, run.path / "final")
    run.finish()


def stage_sample(cfg: Config, run: "Run"):
    """Rejection sampling from --model [R1 2.3.3]: examples.jsonl, which --data reads."""
    setup = prepare(cfg, run)
    examples, fates = rejection_sample(setup.policy, setup.tokenizer, setup.problems, setup.cfg)
    if not examples:
        raise RunError(f"no completion of {setup.cfg.model} is fit to learn from: {dict(fates)}; take easier "
                       f"problems or another model")
    write_problems(run.path / "examples.jsonl", examples)
    run.facts.update(examples=len(examples), completions=fates.total(), fates=dict(fates))
    run.finish()


def stage_eval(cfg: Config, run: "Run"):
    """Evaluation [R1 3] of any checkpoint on any data: of a file, the first eval_problems."""
    run.facts["before"] = prepare(cfg, run).evaluate()
    if rank() == 0:
        run.finish()


RESULT_COLUMNS = {
    "pass@1": "pass_at_1", "lenient": "lenient_accuracy", "maj@k": "maj_at_k", "format": "format_rate",
    "language": "language", "tokens": "mean_tokens", "general": "general", "trained s": "train_seconds",
    "all s": "seconds"}


class Pipeline:
    """A plan of stages, each carried out in its own folder below that of the run; finished ones are kept."""

    def __init__(self, cfg: Config, run: "Run"):
        """Looks at all that is named by the settings, before anything is written or takes long."""
        pick_device(cfg)
        for field in ("model", "teacher", "reward_model"):
            if (path := getattr(cfg, field)) and path not in EMBEDDED:
                load_tokenizer(path, field)
        if cfg.cold_start and not any(
                row.completion for row in load_problems(cfg.cold_start, whole=True, field="cold_start")):
            raise InputError(f"cold_start {cfg.cold_start!r} has no row with a completion")
        load_general(cfg)
        self.cfg, self.run, self.stages, self.files = cfg, run, {}, {}
        self.problems, held_out = load_data(cfg)  # to train on, and to evaluate on: for all stages
        self.shared = dict(data=self.file("problems.jsonl", self.problems),
                           eval_data=self.file("held-out.jsonl", held_out), cold_start=None, teacher=None)

    def file(self, name: str, problems: list[Problem]) -> str:
        """The path of a file that will hold these problems."""
        self.files[path := self.run.path / name] = problems
        return str(path)

    def add(self, name: str, stage: str, before=None, **changes) -> str:
        """Plan a stage; `before` is called first -> the folder of the model that it will leave."""
        folder = self.run.path / name
        cfg = dataclasses.replace(self.cfg, **{**self.shared, "stage": stage, "output_dir": str(folder),
                                               "resume": False, **changes})
        told = " ".join(f"--{key} {value}" for key, value in changes.items() if value is not None)
        self.stages[name] = cfg, before, f"--stage {stage} {told}"
        return str(folder / "final")

    def summary(self, name: str) -> dict | None:
        """What a stage came to, if it is finished."""
        return read_json(self.run.path / name / "summary.json")

    def show_plan(self, seconds_each: float | None):
        """What will be done, with the minutes expected where a completion takes seconds_each."""
        shared = " ".join(f"--{key} {value}" for key, value in self.shared.items() if value)
        show(f"plan      all with {shared}")
        if seconds_each and not all(base_folder(name, self.cfg.seed).exists() for name in EMBEDDED
                                    if any(cfg.model == name for cfg, *_ in self.stages.values())):
            show("plan      embedded base models   2 min each")
        for name, (cfg, _, command) in self.stages.items():
            judged = cfg.eval_problems * cfg.eval_samples
            counts = dict(zero=cfg.steps * cfg.prompts_per_step * cfg.group_size + 4 * judged, sft=3 * judged,
                          sample=len(self.problems) * cfg.rejection_samples)
            if cfg.max_seconds and cfg.stage in ("zero", "sft"):  # and the evaluations before and after
                seconds = cfg.max_seconds + 2 * judged * (seconds_each or 0)
            else:
                seconds = counts.get(cfg.stage, judged) * (seconds_each or 0)
            minutes = f"{max(0.1, seconds / 60):.1f} min" if seconds else "? min"
            told = "done" if self.summary(name) else minutes
            show(f"plan      {name:20} {told:>8}   {command}")

    def carry_out(self):
        """Run what is not finished; then a table of all results, on screen and in summary.json."""
        # One thread of a laptop takes so long; on other machines the first evaluation tells.
        seconds_each = 0.005 if is_tiny(self.cfg.model) else None
        self.show_plan(seconds_each)
        self.run.create()
        for path, problems in self.files.items():
            if not path.exists():
                write_problems(path, problems)
        for name, (cfg, before, _) in self.stages.items():
            if self.summary(name):
                continue
            folder = self.run.path / name
            if not (folder / "config.json").exists():
                shutil.rmtree(folder, ignore_errors=True)  # killed while it began
            if before:
                before()
            show(f"\n== {name}")
            cfg = dataclasses.replace(cfg, resume=folder.exists())
            STAGES[cfg.stage](cfg, Run(cfg, self.run.again))
            if not seconds_each and cfg.stage == "eval":  # to sample and to learn takes three times as long
                seconds_each = 3 * self.summary(name)["seconds"] / (cfg.eval_problems * cfg.eval_samples)
                self.show_plan(seconds_each)
        show(f"\n{'':22}" + "".join(f"{title:>10}" for title in RESULT_COLUMNS))
        for name in self.stages:
            facts = self.summary(name)
            facts.update(facts.get("after", facts.get("before", {})))
            row = {key: facts.get(key) for key in RESULT_COLUMNS.values()}
            show(f"{name:22}" + "".join(f"{'-':>10}" if value is None else
                                        f"{value:>10.{1 if value > 1 else 3}f}" for value in row.values()))
            self.run.facts.setdefault("results", {})[name] = row
        self.run.facts["seconds"] = sum(row["seconds"] for row in self.run.facts["results"].values())
        self.run.finish()


def stage_r1(cfg: Config, run: "Run"):
    """DeepSeek-R1 [R1 2.3]: cold start, reasoning RL, SFT of the base on what came of it, RL for all."""
    if not is_tiny(cfg.model) and not (cfg.cold_start and cfg.general_data):
        raise InputError("cold_start and general_data: outside the embedded world r1 needs both; --help says "
                         "what is in them")
    if cfg.max_seconds:
        raise InputError(f"max_seconds is {cfg.max_seconds}; r1 cannot keep to a time, give it --steps")
    plan, rng = Pipeline(cfg, run), random.Random(cfg.seed)
    cold = cfg.cold_start or plan.file("cold-start.jsonl", [
        dataclasses.replace(p, completion=" ".join(write_completion(rng, p, CAREFUL)[:-1]))
        for p in rng.sample(calculator_problems(), 200)])
    general = cfg.general_data or plan.file("general.jsonl", general_problems())
    mixed = run.path / "mixed.jsonl"
    plan.shared.update(general_data=general, reward_model=cfg.reward_model, preference_steps=0)
    if not cfg.reward_model:
        plan.shared["reward_model"] = plan.add(
            "0-reward-model", "reward", model=cfg.model, data=general, eval_data=None, general_data=None,
            sft_epochs=8)

    def mix():
        """The examples of the third stage: reasoning, and general replies."""
        rows = read_problems(run.path / "3-samples" / "examples.jsonl")
        write_problems(mixed, rows + [p for p in load_problems(general) if not p.rejected])

    plan.add("0-base", "eval", model=cfg.model)
    dev1 = plan.add("1-cold-start", "sft", model=cfg.model, data=cold)
    language_weight = cfg.language_weight or 1.0
    dev2 = plan.add("2-reasoning-rl", "zero", model=dev1, language_weight=language_weight)
    plan.add("3-samples", "sample", model=dev2)
    dev3 = plan.add("3-sft", "sft", mix, model=cfg.model, data=str(mixed))
    plan.add("4-all-scenarios", "zero", model=dev3, language_weight=language_weight, temperature=0.7,
             preference_steps=cfg.preference_steps or max(1, cfg.steps // 4))
    plan.carry_out()


def stage_distill(cfg: Config, run: "Run"):
    """Distillation against RL [R1 2.4, 4.1]: one student four ways, (b), (c) and (d) trained equally long."""
    if not is_tiny(cfg.model) and not (cfg.teacher and cfg.max_seconds):
        raise InputError("teacher and max_seconds: distill needs a checkpoint to learn from, and the seconds "
                         "for which the student is trained; give both")
    student, budget = "tinier" if cfg.model == "tiny" else cfg.model, cfg.max_seconds or 20.0
    plan, teacher = Pipeline(dataclasses.replace(cfg, model=student), run), cfg.teacher
    template = TINY["template"] if not teacher or is_tiny(teacher) else cfg.template
    if not teacher:
        teacher = plan.add("0-teacher", "zero", model="tiny", language_weight=1.0, max_seconds=None)
    plan.add("0-samples", "sample", model=teacher, template=template)
    examples = str(run.path / "0-samples" / "examples.jsonl")
    grpo, sft = dict(steps=10**6, eval_every=0), dict(data=examples, sft_epochs=10**6)  # time ends them
    plan.add("a-as-it-was", "eval", model=student)
    plan.add("b-grpo", "zero", model=student, max_seconds=budget, **grpo)
    plan.add("c-distilled", "sft", model=student, max_seconds=budget, **sft)
    half = plan.add("d-half-distilled", "sft", model=student, max_seconds=budget / 2, **sft)
    plan.add("d-then-grpo", "zero", model=half, max_seconds=budget / 2, **grpo)
    plan.carry_out()


STAGES = dict(zero=stage_zero, sft=stage_sft, reward=stage_reward, sample=stage_sample, eval=stage_eval,
              r1=stage_r1, distill=stage_distill)
PIPELINES = ("r1", "distill")  # typed again, they go on with what is not finished


# ------------------------------------------------------------------------------------------------------------
# Checkpoints, log, main
# ------------------------------------------------------------------------------------------------------------


def rank() -> int:
    """Number of this process among those that train together; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all():
    """Nobody goes on before all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def show(text: str):
    """A line on screen, from one process, that breaks no progress bar."""
    if rank() == 0:
        tqdm.write(text)


def pick_device(cfg: Config) -> tuple[torch.device, torch.dtype]:
    """The device, and the type of weights on it: bfloat16 where the hardware has it."""
    name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device is {cfg.device!r}, but torch sees no CUDA GPU; leave it out or use cpu")
    try:
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    except RuntimeError:
        raise InputError(f"device is {cfg.device!r}; it must be auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    auto = torch.bfloat16 if has_bf16 else torch.float32
    return device, auto if cfg.dtype == "auto" else getattr(torch, cfg.dtype)


@functools.lru_cache
def hub_is_reachable() -> bool:
    """Whether the Hugging Face hub answers; by itself transformers would try again for most of a minute."""
    try:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", HUB), method="HEAD")
        urllib.request.urlopen(request, timeout=5).close()
        return True
    except urllib.error.HTTPError:
        return True  # a refusal is an answer
    except OSError:
        return False


def load_pretrained(kind, path: str, **settings):
    """kind.from_pretrained of a folder or a name on the hub; without network, of what is in the cache."""
    local = Path(path).exists() or not hub_is_reachable()
    return kind.from_pretrained(path, local_files_only=local, **settings)


def load_tokenizer(path: str, field: str = "model"):
    """The tokenizer of a checkpoint folder or hub name; `field` names the setting in errors."""
    if "stage" in (read_json(Path(path, "config.json")) or {}):
        raise InputError(f"{field} {path!r} is the folder of a run; its model is {path}/final")
    try:
        tokenizer = load_pretrained(AutoTokenizer, path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if Path(path).exists() or hub_is_reachable() else (
            "no such folder, and the hub cannot be reached")
        raise InputError(f"{field} {path!r}: no tokenizer there ({reason}); give a checkpoint folder or, "
                         f"with network, a name on the hub") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{field} {path!r}: its tokenizer has no end token, nothing could end; set its "
                         f"eos_token")
    return tokenizer


def load_model(path: str, device, dtype):
    """A causal language model of transformers; refused where this file would not compute what it computes."""
    try:
        model = load_pretrained(AutoModelForCausalLM, path, dtype=dtype, attn_implementation="grouped")
    except (OSError, ValueError) as error:
        raise InputError(f"model {path!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    for module in model.to(device).modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # sampling has none, and the ratio compares like with like
    ids = torch.arange(8, device=device)[None]
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        ours = model.get_output_embeddings()(hidden).float()
        model.set_attn_implementation("eager")
        plain = model(input_ids=ids, use_cache=False).logits.float()
        model.set_attn_implementation("grouped")
    close = torch.allclose(ours, plain, atol=1e-3 if dtype == torch.float32 else 0.5, rtol=0.05)
    if not close or getattr(model.config, "sliding_window", None):
        raise InputError(f"model {path!r}: {model.config.model_type} has an attention or an output layer "
                         f"that this file does not know; take a Qwen2, Qwen3 or Llama checkpoint")
    return model


def memory_estimate(model_config, parameters: int, cfg: Config, dtype: torch.dtype) -> dict[str, float]:
    """GB by use on the device; `row` is one completion while it is sampled."""
    size, hidden, layers = dtype.itemsize, model_config.hidden_size, model_config.num_hidden_layers
    kept = layers * (1 if cfg.gradient_checkpointing else 16)  # hidden states a token, roughly
    in_layer = 16 * hidden + 3 * model_config.intermediate_size  # of the layer that is being recomputed
    heads = model_config.num_key_value_heads * head_size(model_config)
    length = cfg.max_prompt_tokens + cfg.max_completion_tokens + 256  # rounded up
    use = dict(
        weights=size * parameters, masters=4 * parameters * (size < 4), moments=8 * parameters,
        gradients=(4 + size * (size < 4)) * parameters,
        reference=size * parameters * (cfg.stage == "zero" and cfg.kl_coef > 0),
        activations=size * cfg.micro_batch_tokens * (kept * hidden + in_layer),
        logits=16 * cfg.logits_chunk_tokens * model_config.vocab_size,  # float32, four at a time
        row=2 * size * layers * heads * length + 40 * model_config.vocab_size)  # ten where top-p sorts
    if cfg.reward_model:
        use["judge"] = size * parameters  # if it is as large
    if cfg.stage in ("eval", "sample"):
        use = {name: use[name] for name in ("weights", "row")}
    return {name: value / 1e9 for name, value in use.items()}


def plan_memory(cfg: Config, path: str, device, dtype) -> Config:
    """Before a model is loaded: what it will need, on screen -> cfg with the `max_rows` that fit on a GPU."""
    model_config = load_pretrained(AutoConfig, path)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(model_config).num_parameters()
    show(f"device    {device}, {str(dtype).removeprefix('torch.')}")
    show(f"model     {path}: {model_config.model_type}, {parameters:,} weights")
    if device.type != "cuda":
        return cfg
    use = memory_estimate(model_config, parameters, cfg, dtype)
    free, row = torch.cuda.mem_get_info(device)[0] / 1e9, use.pop("row")
    fixed = sum(use.values())
    fit = int((0.95 * free - fixed) / row)
    if fit < max(cfg.group_size, cfg.eval_samples, cfg.rejection_samples):
        raise InputError(
            f"memory: {fixed:.1f} GB and {row:.2f} GB a completion are needed, {free:.1f} GB are free; lower "
            f"micro_batch_tokens ({cfg.micro_batch_tokens}), max_completion_tokens "
            f"({cfg.max_completion_tokens}) or group_size ({cfg.group_size}), set kl_coef 0, or take a "
            f"smaller model")
    rows = min(cfg.max_rows or cfg.prompts_per_step * max(cfg.group_size, cfg.rejection_samples), fit)
    show("memory    " + ", ".join(f"{name} {gb:.1f}" for name, gb in use.items())
         + f", {rows} rows {rows * row:.1f}: {fixed + rows * row:.1f} of {free:.1f} GB free")
    return dataclasses.replace(cfg, max_rows=rows)


def check_data(problems: list[Problem], cfg: Config, advice: str = "mend them") -> list[Problem]:
    """Refuse references that no answer could match, or leave them out."""
    bad = check_references(problems)
    if bad and not cfg.skip_bad_answers:
        shown = ", ".join(f"{p.answer[:40]!r} to {p.question[:40]!r}" for p in bad[:3])
        raise InputError(f"data: {len(bad)} reference answers do not verify against themselves: {shown}; "
                         f"{advice} or set --skip_bad_answers")
    ids = {id(problem) for problem in bad}
    if len(bad) == len(problems):
        raise InputError(f"data: no problem with a reference answer is left; give more, or {advice}")
    return [problem for problem in problems if id(problem) not in ids]


def check_prompts(problems: list[Problem], tokenizer, cfg: Config):
    """Refuse prompts that are too long."""
    for problem in problems:
        tokens = len(encode_prompt(tokenizer, render_prompt(tokenizer, problem.question, cfg)))
        if tokens > cfg.max_prompt_tokens:
            raise InputError(f"a question makes a prompt of {tokens} tokens, above max_prompt_tokens "
                             f"{cfg.max_prompt_tokens}; raise that, or leave out {problem.question[:50]!r}")


def load_data(cfg: Config) -> tuple[list[Problem], list[Problem]]:
    """What a stage trains on, and what it evaluates on; no problem is in both."""
    whole = cfg.eval_data is not None or cfg.stage == "eval"
    # The embedded model has words for one form of Countdown only.
    source = "calculator" if cfg.data == "countdown" and is_tiny(cfg.model) else cfg.data
    held_out = load_problems(cfg.eval_data or source, True, cfg.seed, whole,
                             "eval_data" if cfg.eval_data else "data")
    if cfg.stage == "reward":
        held_out = [problem for problem in held_out if problem.rejected]
    else:
        held_out = check_data([p for p in held_out if p.task not in GENERAL], cfg, "give --eval_data")
    if cfg.stage == "eval":
        return held_out, held_out[: cfg.eval_problems]
    problems, keys = load_problems(source, False, cfg.seed, whole), {split_key(p) for p in held_out}
    apart = [problem for problem in problems if split_key(problem) not in keys]
    if not apart:
        raise InputError(f"data {cfg.data!r}: every problem of it is in eval_data too; keep them apart")
    if len(apart) < len(problems):
        show(f"data      {len(problems) - len(apart)} of {len(problems)} problems are in eval_data too: not "
             f"trained on")
    wanted = {"sft": "completion", "reward": "rejected"}.get(cfg.stage, "question")
    problems = [problem for problem in apart if getattr(problem, wanted)]
    if not problems:
        raise InputError(f"data {cfg.data!r} has no row with {wanted!r}, from which {cfg.stage} learns")
    if cfg.stage != "sft" and any((p.task in GENERAL) != (cfg.stage == "reward") for p in problems):
        raise InputError(f"data {cfg.data!r}: rows with the task helpful or harmless are for stage reward "
                         f"and for general_data, all others for the other stages")
    return check_data(problems, cfg) if wanted == "question" else problems, held_out[: cfg.eval_problems]


def load_general(cfg: Config, evaluation: bool = False) -> list[Problem]:
    """Rows of general_data: examples, pairs and questions without a rule."""
    rows = load_problems(cfg.general_data, evaluation, field="general_data") if cfg.general_data else []
    if any(problem.task not in GENERAL for problem in rows):
        raise InputError(f"general_data {cfg.general_data!r}: every row must have the task helpful or "
                         f"harmless")
    return rows


def base_folder(name: str, seed: int) -> Path:
    """Where an embedded base model lies, or will."""
    return Path("runs", f"{name.replace('tiny', 'base')}-seed{seed}")


def base_checkpoint(cfg: Config, run: "Run") -> str:
    """The folder or name of --model; an embedded base model is made if it is not there yet."""
    if cfg.model not in EMBEDDED:
        return cfg.model
    folder, began = base_folder(cfg.model, cfg.seed), time.perf_counter()
    if not folder.exists():
        wait_for_all()  # all have looked
        if rank() == 0:
            build_base_model(folder, cfg.seed, width=EMBEDDED[cfg.model])
        wait_for_all()
        run.facts["base_seconds"] = time.perf_counter() - began
    return str(folder)


@dataclass
class Setup:
    """What a stage works with."""

    cfg: Config
    tokenizer: object
    policy: object
    problems: list[Problem]  # to train on
    held_out: list[Problem]  # to evaluate on
    general: list[Problem]  # without a rule, to train on
    pairs: list[Problem]  # held-out preference pairs
    reward_model: RewardModel | None
    state: dict | None  # of a run to go on with

    def evaluate(self) -> dict:
        """`evaluate`, and `win_rate` where there is a judge."""
        result = evaluate(self.policy, self.tokenizer, self.held_out, self.cfg)
        if self.reward_model and self.pairs:
            result["general"] = win_rate(self.policy, self.tokenizer, self.pairs, self.cfg, self.reward_model)
        return result


def prepare(cfg: Config, run: "Run") -> Setup:
    """How every stage begins, cheap checks first."""
    device, dtype = pick_device(cfg)
    if is_tiny(cfg.model):
        torch.set_num_threads(1)  # its matrices are so small that waiting for a second thread costs more
    problems, held_out = load_data(cfg)
    rows = [load_general(cfg, evaluation) for evaluation in (False, True)]
    general = list({problem.question: problem for problem in rows[0]}.values())
    pairs = [problem for problem in rows[1] if problem.rejected][: cfg.eval_problems]
    folder, state = run.load() if cfg.resume else (None, None)
    if state:
        run.facts = state["facts"]
    path = str(folder or base_checkpoint(cfg, run))
    tokenizer = load_tokenizer(path)
    check_prompts(problems + held_out + general + pairs, tokenizer, cfg)
    cfg = plan_memory(cfg, path, device, dtype)
    policy = judge = None
    if cfg.stage == "reward":
        judge = RewardModel(path, cfg, device, dtype, untrained=True)
    else:
        policy = load_model(path, device, dtype)
        if cfg.reward_model and cfg.stage != "sample":
            judge = RewardModel(cfg.reward_model, cfg, device, dtype)
    run.create()
    training = f"{len(problems):,} problems to train on, " * (cfg.stage != "eval")
    show(f"data      {cfg.data}: {training}{len(held_out):,} to evaluate on")
    prompt = render_prompt(tokenizer, problems[0].question, cfg)
    stops = {i: tokenizer.decode([i]) for i in sorted(stop_token_ids(policy or judge.model, tokenizer))}
    show(f"prompt    {prompt!r}, its last ids {encode_prompt(tokenizer, prompt)[-5:]}; stop tokens {stops}")
    return Setup(cfg, tokenizer, policy, problems, held_out, general, pairs, judge, state)


def sparkline(values: list[float], width: int = 50) -> str:
    """A curve as one line of text, neighbours averaged down to `width`."""
    size = min(width, len(values))
    means = [mean(values[i * len(values) // size : (i + 1) * len(values) // size]) for i in range(size)]
    low, span = min(means, default=0), max(means, default=0) - min(means, default=0) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[int(7.99 * (value - low) / span)] for value in means)


def doctor(m: dict, cfg: Config) -> list[str]:
    """What looks wrong in a step's metrics, in words."""
    unjudged = m["outcomes"].get("timeout", 0) + m["outcomes"].get("error", 0)
    findings = (
        (m["truncated"] > 0.5, f"{m['truncated']:.0%} of completions hit max_completion_tokens "
         f"({cfg.max_completion_tokens}): raise it, and check the stop tokens above"),
        (m["dead_groups"] == 1 and m["accuracy"] < 0.9, "all groups flat: no gradient; take easier problems, "
         "a larger group_size, or a template whose format the model can hit"),
        (0.8 < m["dead_groups"] < 1 and m["accuracy"] < 0.9,
         f"{m['dead_groups']:.0%} of groups flat: hardly any gradient"),
        (m["clip_fraction"] > 0.3, f"the clip stops {m['clip_fraction']:.0%} of tokens: lower learning_rate"),
        (m["kl"] > 1, f"a KL of {m['kl']:.1f} nats a token from the reference: lower learning_rate"),
        (m["entropy"] < 0.02, f"an entropy of {m['entropy']:.3f} nats: completions hardly differ any more"),
        (m["sampler_gap"] > 0.05, f"log-probabilities {m['sampler_gap']:.2f} nats from those at sampling "
         "before any update: sampling and training disagree"),
        (not math.isfinite(m["grad_norm"]), "the gradient is not finite: this update was left out"),
        (m["outcomes"].get("unparsable", 0) > 0.2 * sum(m["outcomes"].values()),
         f"{m['outcomes'].get('unparsable', 0)} answers could not be read as answers"),
        (unjudged > 0, f"{unjudged} answers could not be judged (time-out or error)"))
    return [sentence for holds, sentence in findings if holds]


MAY_CHANGE = ("steps", "save_every", "log_every", "sample_every")  # between a run and its resumption
STEP_COLUMNS = (  # title, metric, width, format
    ("step", "step", 4, "d"), ("reward", "reward", 6, ".2f"), ("accuracy", "accuracy", 8, ".2f"),
    ("format", "format", 6, ".2f"), ("tokens", "mean_tokens", 6, ".1f"), ("cut", "truncated", 4, ".0%"),
    ("reflect", "reflection", 7, ".0%"), ("dead", "dead_groups", 4, ".0%"), ("loss", "loss", 6, ".3f"),
    ("kl", "kl", 6, ".4f"), ("clip", "clip_fraction", 5, ".1%"), ("grad", "grad_norm", 5, ".2f"),
    ("entropy", "entropy", 7, ".2f"), ("sample/s", "sample_tokens_per_second", 8, ",.0f"),
    ("update/s", "update_tokens_per_second", 8, ",.0f"))


def step_line(metrics: dict | None) -> str:
    """A step as a row of numbers; None gives the titles of its columns. The last two are tokens a second."""
    return " ".join(f"{title if metrics is None else format(metrics[name], form):>{width}}"
                    for title, name, width, form in STEP_COLUMNS)


def saved_settings(cfg: Config) -> dict:
    """What config.json holds."""
    return dataclasses.asdict(dataclasses.replace(cfg, resume=False, output_dir=None))


def changed_settings(cfg: Config, folder: Path) -> list[str] | None:
    """What keeps a run in a folder from going on with these settings, in words; None: there is no run."""
    saved, pipeline = read_json(folder / "config.json"), cfg.stage in PIPELINES
    return saved and [f"{name} was {saved.get(name)!r}, is {value!r}"
                      for name, value in saved_settings(cfg).items() if value != saved.get(name)
                      and name not in MAY_CHANGE[pipeline:]]  # a pipeline's steps are its stages' for good


def run_folder(cfg) -> Path:
    """output_dir; else the first free of runs/STAGE, runs/STAGE-2, …; to resume, the last that is taken.

    A pipeline takes the folder that has its settings: typed again, it goes on.
    """
    if cfg.output_dir:
        return Path(cfg.output_dir)
    folders = (Path("runs", cfg.stage if n == 1 else f"{cfg.stage}-{n}") for n in itertools.count(1))
    last = None
    while (folder := next(folders)).exists():
        last = folder
        if cfg.stage in PIPELINES and not cfg.resume and changed_settings(cfg, folder) == []:
            return folder
    return last if cfg.resume and last else folder


class Run:
    """The folder of a run, and its lines on screen.

    config.json; metrics.jsonl, a step a line; evaluations.jsonl; samples.jsonl; summary.json; checkpoint/, to
    resume from; best/ and final/, ordinary transformers checkpoints.
    """

    def __init__(self, cfg: Config, again: str = ""):
        self.cfg, self.path, self.elapsed, self.stopped_by, self.lines = cfg, run_folder(cfg), 0.0, 0, 0
        self.metrics, self.facts = [], {}  # what metrics.jsonl and summary.json hold
        self.again = again or f"python grpo.py --resume --output_dir {self.path}"
        changed, pipeline = changed_settings(cfg, self.path), cfg.stage in PIPELINES
        if cfg.resume and changed is None:
            raise InputError(f"output_dir {str(self.path)!r} holds no run to resume")
        if changed and (cfg.resume or pipeline):
            raise InputError(f"output_dir {str(self.path)!r} holds a run, but {', '.join(changed)}; leave "
                             f"these as they were, or start a new run in another folder")
        goes_on = cfg.resume or pipeline and changed == []
        if not goes_on and self.path.exists() and (self.path.is_file() or any(self.path.iterdir())):
            raise InputError(f"output_dir {str(self.path)!r} already holds a run or other files; go on with "
                             f"it by --resume, or name another folder")
        self.started, self.settings = time.perf_counter(), saved_settings(cfg)
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not os.access(parent, os.W_OK):
            raise InputError(f"output_dir {str(self.path)!r} cannot be written: no permission in {parent}")

    def create(self):
        """Make the folder, once nothing in the command can be wrong any more."""
        wait_for_all()  # the others may still be looking whether it is free
        if rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            settings = json.dumps(self.settings, indent=2, ensure_ascii=False)
            write_text(self.path / "config.json", settings + "\n")
        wait_for_all()

    def seconds(self) -> float:
        """Since the run began, without the time between an interruption and its resumption."""
        return self.elapsed + time.perf_counter() - self.started

    def append(self, name: str, row: dict):
        """One more line of a log; a number that is not finite becomes null, as JSON has none."""
        if rank() == 0:
            row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def log_step(self, metrics: dict, rollout: Rollout, batch: list[Problem]):
        """A step: its line in the log and, every so often, on screen, with the doctor's word and a sample."""
        cfg, step = self.cfg, metrics["step"]
        self.metrics.append({**metrics, "seconds": self.seconds()})
        self.append("metrics.jsonl", self.metrics[-1])
        if not math.isfinite(metrics["grad_norm"]):
            torch.save(vars(rollout), self.path / f"not_finite_step_{step}_rank_{rank()}.pt")
        if step % cfg.log_every == 0:
            if self.lines % 20 == 0:
                show(step_line(None))
            self.lines += 1
            show("\n     doctor: ".join([step_line(metrics), *doctor(metrics, cfg)]))
        if cfg.sample_every and (step == 1 or step % cfg.sample_every == 0):
            row = step % len(rollout.texts)
            problem, text = batch[row // cfg.group_size], rollout.texts[row]
            outcome = grade(text, problem)
            self.append("samples.jsonl", dict(step=step, question=problem.question, answer=problem.answer,
                                              completion=text, outcome=outcome))
            show(f"     {problem.question} -> {text}  [{outcome}]")

    def log_evaluation(self, step: int, result: dict) -> bool:
        """An evaluation, on disk and on screen -> whether it is the best so far."""
        self.append("evaluations.jsonl", {"step": step, **result})
        show(f"held-out  step {step}: pass@1 {result['pass_at_1']:.3f}, maj@{result['k']} "
             f"{result['maj_at_k']:.3f}, {result['mean_tokens']:.0f} tokens, "
             f"{result['reflection_rate']:.0%} reflect")
        best = result["pass_at_1"] > self.facts.get("best", {"pass_at_1": -1.0})["pass_at_1"]
        if best:
            self.facts["best"] = {"step": step, "pass_at_1": result["pass_at_1"]}
        return best

    def finish(self):
        """summary.json, and on screen the results before and after, and the curves."""
        cfg = self.cfg
        columns = {name: self.facts[name] for name in ("before", "after") if name in self.facts}
        summary = dict(stage=cfg.stage, model=cfg.model, data=cfg.data, seed=cfg.seed, seconds=self.seconds())
        write_text(self.path / "summary.json", json.dumps({**summary, **self.facts}, indent=2) + "\n")
        told = ", ".join(f"{name} {fact:.3f}" if isinstance(fact, float) else f"{name} {fact}"
                         for name, fact in self.facts.items() if not name.endswith("seconds")
                         and (name == "fates" or not isinstance(fact, dict)))
        show("\n" * bool(told) + told)

        def cell(value):
            values = value if isinstance(value, list) else [value]
            return f"{' - '.join(f'{v:.3f}' if isinstance(v, float) else str(v) for v in values):>16}"

        titles = columns if "after" in columns else ["result"]
        if columns:
            show(f"\n{'held-out problems':20}" + "".join(f"{name:>16}" for name in titles))
        for name in self.facts.get("before", ()):
            show(f"{name:20}" + "".join(cell(column[name]) for column in columns.values()))
        for name in ("accuracy", "mean_tokens", "reflection", "entropy") if self.metrics else ():
            values = [v for row in self.metrics if (v := row[name]) is not None and math.isfinite(v)]
            show(f"{name:12} {sparkline(values)} {values[0]:.2f} -> {values[-1]:.2f}" if values else name)
        if self.metrics and self.metrics[-1]["update_peak_gb"]:
            peaks = (max(row[name] for row in self.metrics) for name in ("sample_peak_gb", "update_peak_gb"))
            show("peak memory: sampling {:.1f} GB, update {:.1f} GB".format(*peaks))
        spent = "".join(f", {self.facts[name + '_seconds']:.0f} of them for {what}" for name, what in (
            ("base", "the base model"), ("train", "training")) if self.facts.get(name + "_seconds"))
        show(f"wrote {self.path}/ in {self.facts.get('seconds', self.seconds()):.0f} seconds{spent}")

    @contextlib.contextmanager
    def stoppable(self):
        """Within it, the first Ctrl-C or SIGTERM is noted, for the end of the step; a second ends at once."""
        def note(signum, _):
            self.stopped_by = signum
            signal.signal(signum, before[signum])
            show("finishing this step, then saving; once more to end at once")

        before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def save(self, model, tokenizer, state: dict):
        """A checkpoint to resume from; the two last are kept."""
        folder = self.path / "checkpoint" / f"step-{state['step']:06d}"
        try:
            save_model(model, tokenizer, folder, {**state, "seconds": self.seconds(), "facts": self.facts})
        except Exception as error:  # OSError, and what safetensors and torch make of a full disk
            reason = str(error).splitlines()[0]
            raise RunError(f"the checkpoint of step {state['step']} could not be saved ({reason}); those "
                           f"before are whole: free some space, then {self.again}") from None
        for old in sorted(folder.parent.glob("step-*"))[:-2]:
            shutil.rmtree(old)

    def load(self) -> tuple[Path | None, dict | None]:
        """The newest checkpoint that is whole -> its folder and state; the logs are cut back to its step."""
        folder, state = None, None
        for folder in sorted((self.path / "checkpoint").glob("step-*"), reverse=True):
            digests = read_json(folder / "files.json") or {"files.json": None}
            damaged = [name for name, digest in digests.items() if file_digest(folder / name) != digest]
            if not damaged:
                state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
                if state["step"] > self.cfg.steps:
                    raise InputError(f"steps is {self.cfg.steps}, but the run is at step {state['step']} "
                                     f"already; give more, or start a new run")
                self.elapsed = state["seconds"]
                break
            show(f"checkpoint {folder} is damaged ({', '.join(damaged)}); the one before it is used")
        for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl") if rank() == 0 else ():
            path = self.path / name
            lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
            rows = [json.loads(line) for line in lines if line.endswith("}")]  # a crash may have cut the last
            rows = [row for row in rows if state and row["step"] <= state["step"]]
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            self.metrics = rows if name == "metrics.jsonl" else self.metrics
        return (folder, state) if state else (None, None)


def read_json(path: Path) -> dict | None:
    """A JSON file; None if there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file; empty if there is none."""
    digest = hashlib.sha256()
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def save_model(model, tokenizer, folder: Path, state: dict | None = None):
    """An ordinary transformers checkpoint, with `state` one to resume from; written beside, then moved."""
    temporary = folder.with_name(f"writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if model.can_generate():
            model.generation_config.eos_token_id = sorted(stop_token_ids(model, tokenizer))
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if state:
            torch.save(state, temporary / "state.pt")
            digests = {path.name: file_digest(path) for path in filter(Path.is_file, temporary.iterdir())}
            (temporary / "files.json").write_text(json.dumps(digests), encoding="utf-8")
        for path in filter(Path.is_file, temporary.rglob("*")):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """The command line -> 0, 1 (it cannot go on), 2 (bad input); exits with 130 or 143 when stopped."""
    transformers.utils.logging.disable_progress_bar()  # it would show one for every file
    transformers.utils.logging.set_verbosity_error()  # a classifier's new head is no news
    run = None
    try:
        cfg = parse_args(sys.argv[1:] if argv is None else argv)
        if "LOCAL_RANK" in os.environ and not dist.is_initialized():  # started by torchrun
            dist.init_process_group("nccl" if torch.cuda.is_available() and cfg.device != "cpu" else "gloo")
        if cfg.prompts_per_step * cfg.group_size % (processes() * cfg.updates_per_rollout) or (
                cfg.prompts_per_step % processes()):
            raise InputError(f"prompts_per_step is {cfg.prompts_per_step}; each of {processes()} processes "
                             f"must get the same number, and updates_per_rollout divide its completions")
        if processes() > 1 and cfg.stage not in ("zero", "sft", "eval"):
            raise InputError(f"stage {cfg.stage} runs in one process; start it without torchrun")
        run = Run(cfg)
        if cfg.resume and cfg.stage not in ("zero", *PIPELINES) and (run.path / "summary.json").exists():
            show(f"{run.path} is finished")
        else:
            STAGES[cfg.stage](cfg, run)
        return 0
    except KeyboardInterrupt:
        print(f"\ngrpo.py: stopped{f'; go on with: {run.again}' if run else ''}", file=sys.stderr)
        return 130
    except InputError as error:
        print(f"grpo.py: error: {error}", file=sys.stderr)
        return 2
    except (RunError, OSError) as error:
        print(f"grpo.py: stopped: {error}", file=sys.stderr)
    except torch.cuda.OutOfMemoryError as error:
        called = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        phase, knobs = next((phase, knobs) for name, phase, knobs in (
            ("sample_completions", "sampling", "max_rows or max_completion_tokens"),
            ("score_logprobs", "log-probabilities", "micro_batch_tokens or logits_chunk_tokens"),
            ("fit", "supervised training", "micro_batch_tokens or logits_chunk_tokens"),
            ("update_policy", "the update", "micro_batch_tokens or logits_chunk_tokens, or set kl_coef 0"),
            ("train_grpo", "the reference or the masters", "kl_coef to 0, or take a smaller model"),
            ("main", "loading", "the size of the model")) if name in called)
        print(f"grpo.py: stopped: out of GPU memory in {phase}, after a peak of "
              f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB; lower {knobs}", file=sys.stderr)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 1


if __name__ == "__main__":
    sys.exit(main())
