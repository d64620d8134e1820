"""grpo.py: how DeepSeek-R1 was made, in one readable file.

R1-Zero takes a base model, samples a group of completions for every problem, rewards them by rule, and makes
those that did better than their group more likely; it sees no example of reasoning. R1 begins with some,
trains the base anew on right samples, and ends with RL for all that users ask. Distillation needs no RL.

    python grpo.py                                           # R1-Zero, on a laptop
    python grpo.py --stage r1                                # the four stages of R1
    python grpo.py --stage distill                           # teaching against RL
    python grpo.py --model Qwen/Qwen2.5-0.5B --data gsm8k    # R1-Zero, on a CUDA GPU
    python grpo.py --help                                    # every setting

Part one is the paper; you can stop when it is over.       First to read
    Config        settings, with the paper's values          Config
    GRPO          the algorithm                              train_grpo
    Rewards       accuracy, format, language, preference     score
    Sampling      completions of the policy                  sample_completions
    Loss          log-probabilities, advantages, loss        grpo_loss
    Supervised    fine-tuning, rejection sampling            train_sft
    Evaluation    pass@1, pass@k, majority vote              evaluate
    Recipes       R1-Zero, R1, distillation                  r1
Part two is the workshop: problems (Problem), the embedded world of a tiny base model and the generated texts
that it reads, so that all of part one runs on a laptop (build_base_model), the decoder (Decoder), loading
models (load_model), the grader (compare), programs (run_tests), runs (Run, sft), the command line (main).

References: [R1] DeepSeek-R1, arXiv 2501.12948v1; [N] the same in Nature 645 (2025) 633-638, with settings;
[GRPO] DeepSeekMath, 2402.03300; [DAPO] 2503.14476; [DrGRPO] 2503.20783; [PASS] pass@k, 2107.03374.

Departures from the paper, all of them:
    1. Ratio, clip and KL are per token, as [GRPO] has them; [R1 Eq. 1-2] prints them per completion.
    2. A group's standard deviation is the population's plus 1e-4, and a flat group has advantage exactly 0.
    3. The clip range is 0.2. The paper gives none for R1-Zero; [N] gives 10 for R1, which hardly ever acts.
    4. Truncated completions stay in the loss with what they earned; --mask_truncated takes them out.
    5. A step is one rollout for 2 updates, not 16; batches, lengths and models are smaller, rates differ.
    6. Where the paper is silent: Adam's betas are (0.9, 0.95), there is no weight decay, gradients are
       clipped to norm 1, warm-up takes 5 steps, and sums are in float32 over bfloat16 weights.
    7. The embedded model has β = 0, in the fourth stage 0.03; the reference is renewed only with --ref_every.
    8. Rules alone filter the third stage's samples, and one a problem is kept; the paper asks a model too.
    9. One pairwise reward model serves both kinds; the paper's for harmlessness is pointwise. Its pairs set
       the policy's replies against the good one. It acts in the last 9/10 of stage four, not in a quarter.
   10. In the embedded world programs write the first examples and general replies, half of these bad.

Dimension names: batch = prompts x group_size, the completions of a prompt side by side (the variable `batch`
is a step's list of problems); completion = sampled tokens; length = prompt + completion, both padded on the
right; tokens = without any padding.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
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
import statistics
import subprocess
import sys
import tempfile
import time
import unicodedata
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import sympy
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers  # they come with transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AttentionInterface, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer, DynamicCache, PreTrainedTokenizerFast, Qwen3Config)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# =========================================== Part one: the paper ============================================

# ---- Config ------------------------------------------------------------------------------------------------
R1_TEMPLATE = (  # [R1 Table 1], word for word; the question takes the place of {question}
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
    "assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
    "User: {question}. Assistant:")

class InputError(ValueError):
    """Something the user gave cannot be used. The message names it and says what to do; exit status 2."""

class RunError(RuntimeError):
    """A run cannot go on. The message says why and what to do; exit status 1."""

# The type of a setting is also its check: what a value must be, and whether it is.
Natural = Annotated[int, "at least 0", lambda v: v >= 0]
Count = Annotated[int, "at least 1", lambda v: v >= 1]
Group = Annotated[int, "at least 2, because an advantage compares completions of a prompt", lambda v: v >= 2]
Weight = Annotated[float, "a finite number, at least 0", lambda v: 0 <= v < math.inf]
Positive = Annotated[float, "a finite number above 0", lambda v: 0 < v < math.inf]
Template = Annotated[str, "a text with {question} where the question goes", lambda v: "{question}" in v]

def setting(default, help: str):
    """Make a field of Config: its default, and in words its meaning, its unit and the paper's value."""
    return field(default=default, metadata={"help": help})

@dataclass(frozen=True)
class Config:
    """All settings of a run. The defaults suit models of 0.5B to 3B on one GPU; TINY changes some of them."""

    # what runs
    stage: Literal["zero", "sft", "reward", "sample", "eval", "r1", "distill"] = setting(
        "zero", "zero is GRPO; sft and reward train on the examples or pairs in --data; sample writes them")
    model: str = setting("tiny", "tiny (the embedded base), tinier (half as wide), a folder, or a hub name")
    data: str = setting("gsm8k", "calculator (the embedded world), gsm8k, math500, or a JSON-lines file")
    eval_data: str | None = setting(None, "problems to evaluate on; by default a held-out part of --data")
    output_dir: str | None = setting(None, "folder of the run; by default runs/STAGE, runs/STAGE-2, …")
    resume: bool = setting(False, "go on with the run in output_dir, or with the newest of its stage")
    save_every: Count = setting(25, "steps between checkpoints")
    seed: Natural = setting(0, "seeds all that is random, the embedded model's training too")
    device: str = setting("auto", "auto (cuda where there is one), cpu, cuda, cuda:1, …")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto is bfloat16 on a GPU that has it")
    # prompts
    template: Template = setting(R1_TEMPLATE, "prompt of a base model [paper: its Table 1]")
    chat_template: bool = setting(False, "use the tokenizer's chat template, for instruct models")
    # R1's stages and distillation (the embedded world has its own data for them)
    cold_start: str | None = setting(None, "JSON lines with question and completion: R1's first examples")
    general_data: str | None = setting(None, "JSON lines: question, task, completion, rejected; see README")
    reward_model: str | None = setting(None, "classifier with one label that judges general_data")
    preference_steps: Natural = setting(0, "last steps, half of their questions general [paper: 25 of 106]")
    teacher: str | None = setting(None, "checkpoint that distill learns from")
    # sampling from π_old
    prompts_per_step: Count = setting(32, "questions in one step [paper: 512, in 16 updates of 32]")
    group_size: Group = setting(8, "G, completions of each question [paper: 16]")
    max_completion_tokens: Count = setting(768, "longest completion, tokens [paper: 32,768, later 65,536]")
    temperature: Positive = setting(1.0, "T of sampling and of log-probabilities [paper: 1; R1's end 0.7]")
    max_rows: Natural = setting(0, "completions sampled at once; 0: what memory holds, on a CPU 1,024")
    # rewards (the accuracy reward has weight 1)
    format_weight: Weight = setting(1.0, "weight of the format reward [paper: 1]")
    language_weight: Weight = setting(0.0, "weight of the reward for English thoughts [paper: 0, in R1 1]")
    # supervised training
    sft_epochs: Count = setting(2, "passes over the examples [paper: 2 to 3]")
    sft_batch_size: Count = setting(128, "examples in one update [paper: 128]")
    sft_learning_rate: Positive = setting(1e-5, "at the start; it falls to a tenth [paper: 5e-5]")
    rejection_samples: Count = setting(4, "completions of a problem in rejection sampling [paper: several]")
    # GRPO
    steps: Count = setting(200, "sampling rounds [paper: 650, of 16 updates each]")
    updates_per_rollout: Count = setting(2, "optimizer steps on one round's completions [paper: 16]")
    learning_rate: Positive = setting(1e-6, "of AdamW [paper: 3e-6]")
    clip_eps: Positive = setting(0.2, "ε, the gradient is cut where the ratio leaves 1±ε [paper: 10 for R1]")
    clip_eps_high: Weight = setting(0.0, "ε of the upper bound (DAPO: 0.28); 0: that of the lower")
    kl_coef: Weight = setting(0.001, "β, weight of the KL to a reference; 0 loads none [paper: 0.001]")
    ref_every: Natural = setting(0, "steps until the reference becomes the policy; 0: never [paper: 25]")
    loss_average: Literal["sequence", "token", "constant"] = setting(
        "sequence", "mean over a completion (GRPO), over all tokens (DAPO), or a constant (Dr. GRPO)")
    scale_advantages: bool = setting(True, "divide by the group's deviation (Dr. GRPO: no) [paper: yes]")
    mask_truncated: bool = setting(False, "take truncated completions out of the loss (DAPO)")
    # memory
    micro_batch_tokens: Count = setting(16_384, "tokens in one forward and backward pass, with padding")
    gradient_checkpointing: bool = setting(True, "recompute activations in the backward pass")
    # evaluation
    eval_every: Natural = setting(25, "steps between evaluations; 0: only before and after training")
    eval_problems: Count = setting(128, "problems evaluated")
    eval_samples: Count = setting(8, "completions of each of them [paper: 4 to 64]")
    eval_temperature: Weight = setting(0.6, "T of evaluation; 0 is greedy [paper: 0.6, top-p 0.95]")
    sample_every: Natural = setting(20, "steps between completions shown in full; 0: none")

    def __post_init__(self):
        for name, hint in get_type_hints(Config, include_extras=True).items():
            value, kind, parts = getattr(self, name), get_origin(hint), get_args(hint)
            if kind is Literal and value not in parts:
                raise InputError(f"{name} is {value!r}; it must be one of {', '.join(parts)}")
            if kind is Annotated and not parts[2](value):
                raise InputError(f"{name} is {value!r}; it must be {parts[1]}")
        needed = {} if is_tiny(self.model) else dict(r1=["cold_start", "general_data"], distill=["teacher"])
        if self.stage == "zero" and self.preference_steps:
            needed = dict(zero=["general_data", "reward_model"])
        for name in needed.get(self.stage, []):
            if not getattr(self, name):
                raise InputError(f"{name} is None; stage {self.stage} needs it here, see --help")

TINY = dict(  # what the embedded model needs instead
    data="calculator", template="User: {question} Assistant:", prompts_per_step=16, group_size=16,
    max_completion_tokens=144, sft_batch_size=32, sft_learning_rate=5e-4, rejection_samples=2, steps=40,
    learning_rate=5e-4, kl_coef=0.0, micro_batch_tokens=2_048, gradient_checkpointing=False, eval_every=20)
EMBEDDED = dict(tiny=64, tinier=32)  # names of the embedded base models, and their widths

def is_tiny(model):
    """Tell whether a name or folder is the embedded model's, or that of a model trained from it."""
    return model in EMBEDDED or "embedded_world" in (read_json(Path(model, "config.json")) or {})

def make_config(model: str = "tiny", **overrides) -> Config:
    """Take the preset that suits the model, and change some of it."""
    return Config(**{**(TINY if is_tiny(model) else {}), "model": model, **overrides})

# ---- GRPO [R1 2.2.1] ---------------------------------------------------------------------------------------
def train_grpo(policy, tokenizer, problems, cfg, state=None, general=(), reward_model=None):
    """Group Relative Policy Optimization [GRPO Algorithm 1, R1 Eq. 1-3]. It changes `policy` in place.
    This is a generator: after every step it yields (metrics, rollout, batch, state). A later call that is
    given `state` goes on exactly there. The state shares its tensors with training, so save or copy it; what
    is random depends on (seed, step) alone, so no generator is in it. In the last preference_steps every
    second question is a general one. An update whose gradient is not finite is left out."""
    optimizer = MasterAdamW(policy, cfg.learning_rate)
    policy.grpo_decoder = None  # the reference needs no copy of it
    ref_model = copy.deepcopy(policy).requires_grad_(False) if cfg.kl_coef else None  # π_ref
    if cfg.gradient_checkpointing:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    if state:
        optimizer.load_state_dict(state["optimizer"])
    if state and ref_model:
        ref_model.load_state_dict(state["ref_model"])
    first = state["step"] + 1 if state else 1
    state = None  # so that what was loaded is not held twice
    for step in range(first, cfg.steps + 1):
        began, seed = time.perf_counter(), cfg.seed * 1_000_003 + step
        batch = batch_of_problems(problems, step, cfg)  # q ~ P(Q)
        if step > cfg.steps - cfg.preference_steps:
            batch[::2] = batch_of_problems(general, step, cfg)[::2]
        rollout = sample_for(policy, tokenizer, batch, cfg, cfg.group_size, seed)  # o_1 … o_G ~ π_old(.|q)
        rewards, parts, outcomes = score(rollout, batch, cfg, reward_model)
        rollout.advantages = group_advantages(rewards, cfg.scale_advantages).flatten().to(policy.device)
        # In float32 sampler and update agree to 1e-5; in bfloat16 they do not, so π_old is scored again.
        rollout.old_logprobs = (rollout.sample_logprobs if policy.dtype == torch.float32
                                else score_logprobs(policy, rollout, cfg))
        rollout.ref_logprobs = score_logprobs(ref_model, rollout, cfg) if ref_model else None

        learning_rate = cfg.learning_rate * min(1.0, step / 5)  # warm-up
        order = torch.randperm(len(rollout.texts), generator=torch.Generator().manual_seed(seed))
        updates = [update_policy(policy, optimizer, rollout.select(rows), cfg, learning_rate)
                   for rows in order.to(policy.device).chunk(cfg.updates_per_rollout)]
        if ref_model and cfg.ref_every and step % cfg.ref_every == 0:
            ref_model.load_state_dict(policy.state_dict())

        metrics = step_metrics(step, rollout, rewards, parts, outcomes, updates)
        metrics.update(step_seconds=time.perf_counter() - began,
                       peak_gb=torch.cuda.max_memory_allocated() / 1e9)  # 0 without a GPU
        yield metrics, rollout, batch, dict(step=step, optimizer=optimizer.state_dict(),
                                            ref_model=ref_model.state_dict() if ref_model else None)

def batch_of_problems(problems, step, cfg):
    """Take the questions of a step (from 1): the next ones in an order that every epoch shuffles anew.
    This is a function of seed and step alone, so a resumed run needs no other memory of its place."""
    @functools.cache
    def order(epoch):
        """All problems, as this epoch shuffles them."""
        return random.Random(f"{cfg.seed}/{epoch}").sample(problems, len(problems))

    places = range((step - 1) * cfg.prompts_per_step, step * cfg.prompts_per_step)
    return [order(place // len(problems))[place % len(problems)] for place in places]

@torch.no_grad()
def score_logprobs(model, rollout, cfg):
    """Compute `token_logprobs` of a whole rollout, micro-batch by micro-batch: (batch, completion)."""
    logprobs = torch.zeros_like(rollout.sample_logprobs)
    for rows in micro_batches(rollout, cfg.micro_batch_tokens):
        part = token_logprobs(model, rollout.select(rows), cfg.temperature)
        logprobs[rows, : part.shape[1]] = part
    return logprobs

def update_policy(policy, optimizer, rollout, cfg, learning_rate):
    """Take one optimizer step on these completions -> its loss, gradient norm, and means over tokens."""
    policy.train()
    in_loss = rollout.completion_mask & ~(rollout.truncated[:, None] & cfg.mask_truncated)
    rollout.weights = loss_weights(in_loss, cfg.loss_average, cfg.max_completion_tokens)
    sums = Counter()
    for rows in micro_batches(rollout, cfg.micro_batch_tokens):
        part = rollout.select(rows)
        mask = part.weights > 0
        logprobs, entropy = token_logprobs(policy, part, cfg.temperature, return_entropy=True)
        loss, stats = grpo_loss(
            logprobs, part.old_logprobs, part.ref_logprobs, part.advantages, mask, part.weights,
            clip_eps=cfg.clip_eps, clip_eps_high=cfg.clip_eps_high or None, kl_coef=cfg.kl_coef)
        loss.backward()
        optimizer.accumulate()
        gap = (logprobs.detach() - part.sample_logprobs).abs()
        sums.update(stats, loss=loss.item(), entropy=entropy[mask].sum().item(),
                    sampler_gap=gap[mask].sum().item())
    means = {name: total / max(1, sums["tokens"]) for name, total in sums.items()}
    return {**means, "loss": sums["loss"], "grad_norm": optimizer.step(learning_rate)}

def step_metrics(step, rollout, rewards, parts, outcomes, updates):
    """Describe a step in numbers; the README's glossary explains each."""
    names = ("loss", "grad_norm", "kl", "ratio", "clipped", "entropy")
    flat = (rollout.advantages.view(rewards.shape) == 0).all(1)
    return dict(
        step=step, reward=float(rewards.mean()), **{name: mean(part) for name, part in parts.items()},
        mean_tokens=mean(rollout.completion_tokens.tolist()), truncated=mean(rollout.truncated.tolist()),
        flat_groups=mean(flat.tolist()), sampler_gap=updates[0]["sampler_gap"], outcomes=dict(outcomes),
        reflection=mean(bool(REFLECTION.search(text)) for text in rollout.texts),
        **{name: mean(update[name] for update in updates) for name in names})

# ---- Rewards [R1 2.2.2, 2.3.2, 2.3.4] ----------------------------------------------------------------------
# The rewards are the only teacher, and the optimiser searches them for holes. So there is one final answer in
# one place, and the grader reads model text by a closed grammar and never evaluates it.

GENERAL = ("helpful", "harmless")  # tasks that no rule can judge
REFLECTION = re.compile(  # the ten words of [N, supplement, Fig. 9]; 等 is wait, 但 is but
    r"\b(?:wait|mistake|however|but|retry|error|verify|wrong|evaluate|check)\b|等|但", re.IGNORECASE)

def grade(completion, problem, lenient=False):
    """Extract the final answer of a completion and grade it by rules -> (answer or None, outcome).
    Outcomes: right, wrong, unparsable, no_answer, timeout, error; unjudged where there is no rule. `lenient`
    takes an answer from any place, to tell wrong answers from wrong formats."""
    if problem.task in GENERAL:
        return None, "unjudged"
    code = problem.task == "code"
    predicted = extract_program(completion) if code else extract_answer(completion, lenient)
    if predicted is None:
        return None, "no_answer"
    if code:
        return predicted, run_tests(predicted, problem.tests)
    if problem.task == "countdown":
        right = countdown_equal(predicted, problem.numbers, problem.answer)
        return predicted, "right" if right else "wrong"
    return predicted, compare(predicted, problem.answer)

def accuracy_reward(completion: str, problem: Problem) -> float:
    """1 if the final answer is right, else 0 [R1 2.2.2]."""
    return float(grade(completion, problem)[1] == "right")

def code_reward(completion: str, problem: Problem) -> float:
    """1 if the last fenced program passes all of `problem.tests`, else 0 [R1 2.2.2]; see `run_tests`."""
    return accuracy_reward(completion, dataclasses.replace(problem, task="code"))

def format_reward(completion: str, problem: Problem) -> float:
    """1 if the text is <think> thoughts </think> and then something, each tag once, else 0 [R1 2.2.2]."""
    parts = re.fullmatch(r"\s*<think>(.*)</think>(.*)", completion, re.DOTALL)
    once = completion.count("<think>") == completion.count("</think>") == 1
    return float(bool(once and parts and parts[1].strip() and parts[2].strip()))

def language_reward(completion: str, problem: Problem) -> float:
    """The share of English words, known by their Latin letters, in the thoughts [R1 2.3.2, N Eq. 7].
    A CJK ideograph is a word, and so is a run of other letters; numbers and LaTeX are neutral. 1 if none."""
    thoughts = (completion.rpartition("</think>")[0] or completion).rpartition("<think>")[2]
    thoughts = re.sub(r"\$[^$]*\$|\\[A-Za-z]+|<[^<>\s]*>", " ", thoughts)
    words = re.findall(r"[\u3400-\u9fff]|[^\W\d_\u3400-\u9fff]+", thoughts)
    return mean(unicodedata.name(word[0], "").startswith("LATIN") for word in words) if words else 1.0

def score(rollout, batch, cfg, reward_model=None):
    """Reward every completion -> rewards (prompts, group_size), their parts by name, and counted outcomes.
    Rules judge what has a reference, the reward model the rest [N Eq. 8-10]. Each part lists one number a
    completion, or None where it does not apply."""
    group_size = len(rollout.texts) // len(batch)
    rows = [(text, batch[b // group_size]) for b, text in enumerate(rollout.texts)]
    outcomes = [grade(*row)[1] for row in rows]
    parts = dict(accuracy=[None if outcome == "unjudged" else outcome == "right" for outcome in outcomes],
                 format=[format_reward(*row) for row in rows],
                 language=[language_reward(*row) for row in rows])
    if "unjudged" in outcomes:
        scores = iter(reward_model([row for row in rows if row[1].task in GENERAL]))
        parts["preference"] = [next(scores) if outcome == "unjudged" else None for outcome in outcomes]
    weights = dict(accuracy=1.0, format=cfg.format_weight, language=cfg.language_weight, preference=1.0)
    rewards = sum(weights[name] * torch.tensor([value or 0.0 for value in part])
                  for name, part in parts.items())
    return rewards.view(len(batch), group_size), parts, Counter(outcomes)

def judged_part(completion, problem):
    """A reward model sees the final part of a reply if it is to be helpful, all if harmless [R1 2.3.4]."""
    _, closed, final = completion.rpartition("</think>")
    if problem.task == "harmless":
        return completion
    return final.strip() if closed or "<think>" not in completion else ""  # still thinking: no answer

class RewardModel:
    """A preference reward from any sequence classifier with one label, used where rules end [R1 2.3.4].
    It computes in float32, as near a score of 5 bfloat16 resolves only 0.03."""
    def __init__(self, path, cfg, device, untrained=False):
        self.cfg, self.tokenizer = cfg, load_tokenizer(path, "reward_model")
        torch.manual_seed(cfg.seed)  # a new head is drawn at random
        self.model, loading = load_pretrained(AutoModelForSequenceClassification, path, "reward_model",
                                              num_labels=1, dtype=torch.float32, output_loading_info=True)
        if loading["missing_keys"] and not untrained:  # transformers would judge by random weights
            raise InputError(f"reward_model {path!r} has no trained score head; --stage reward trains one")
        self.model.to(device).eval()
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    def encode(self, completion, problem):
        """Join the policy's prompt and the part of the completion that is judged -> token ids."""
        prompt = render_prompt(self.tokenizer, problem.question, self.cfg)
        ids = self.tokenizer(judged_part(completion, problem), add_special_tokens=False)["input_ids"]
        return encode_prompt(self.tokenizer, prompt) + ids

    def scores(self, rows):
        """Score token ids -> (rows,). Padding is on the right, where no causal model looks."""
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        return self.model(**batch.to(self.model.device)).logits[:, 0]

    @torch.no_grad()
    def __call__(self, pairs):
        """Score pairs (completion, problem); only differences between scores on a question mean anything."""
        rows = [self.encode(*pair) for pair in pairs]
        scores = torch.zeros(len(rows))
        for part in pack([len(row) for row in rows], self.cfg.micro_batch_tokens):
            scores[part] = self.scores([rows[row] for row in part]).cpu()
        return scores.tolist()

# ---- Sampling ----------------------------------------------------------------------------------------------
@dataclass
class Rollout:
    """Completions and what is known of them; row b answers prompt b // group_size.
    Lengths count the end token; a row without it is truncated. sample_logprobs were noted while sampling.
    Texts lack the end token; a `<think>` that ends the prompt is put before them."""
    ids: torch.Tensor  # (batch, length): prompt and completion
    prompt_tokens: torch.Tensor  # (batch,)
    completion_tokens: torch.Tensor  # (batch,)
    truncated: torch.Tensor  # (batch,)
    sample_logprobs: torch.Tensor  # (batch, completion)
    texts: list[str]
    advantages: torch.Tensor | None = None  # (batch,)
    old_logprobs: torch.Tensor | None = None  # (batch, completion), of π_old
    ref_logprobs: torch.Tensor | None = None  # (batch, completion), of π_ref
    weights: torch.Tensor | None = None  # (batch, completion), of each token in the loss

    @property
    def completion_mask(self):
        """(batch, completion), true up to the end token; by position, since that may be the pad token too."""
        width = self.sample_logprobs.shape[1]
        return torch.arange(width, device=self.ids.device) < self.completion_tokens[:, None]

    def select(self, rows):
        """Take some rows, without the columns that would only pad."""
        length = int((self.prompt_tokens + self.completion_tokens)[rows].max())
        width = int(self.completion_tokens[rows].max())
        chosen = {name: value[rows] for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        for name, value in chosen.items():
            if value.dim() == 2:
                chosen[name] = value[:, : length if name == "ids" else width]
        return Rollout(**chosen, texts=[self.texts[row] for row in rows.tolist()])

def pick_tokens(logits, uniform, temperature, top_p=1.0):
    """Draw from softmax(logits / temperature) by inverting its cumulative sum at `uniform`.
    logits (batch, vocab), uniform (batch,) in [0, 1) -> tokens (batch,) and their log-probabilities (batch,),
    float32, under the full softmax. One number decides a row, so rows cannot disturb each other. Temperature
    0 is greedy, with the log-probabilities of temperature 1. top_p leaves the smallest set of most probable
    tokens that reaches it, and what is as probable as the last; all, if 4,096 tokens do not reach it."""
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens = logprobs.argmax(-1, keepdim=True)
    else:
        probs = logprobs.exp()
        if top_p < 1:  # to sort all of 152,000 words takes as long as the rest of a step
            largest = probs.topk(min(4096, probs.shape[1])).values
            last = largest.masked_fill(largest.cumsum(-1) < top_p, 0.0).amax(-1, keepdim=True)
            probs = probs.masked_fill(probs < last, 0.0)
        cumulative = probs.cumsum(-1)
        tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
        tokens = tokens.clamp(max=logits.shape[1] - 1)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]

@torch.no_grad()
def sample_completions(model, tokenizer, prompts: list[str], *, group_size: int, max_completion_tokens: int,
                       temperature: float = 1.0, top_p: float = 1.0, seed: int = 0,
                       max_rows: int | None = None) -> Rollout:
    """Sample `group_size` completions of each prompt -> Rollout of prompts x group_size rows.
    A completion depends on its prompt, its place in the batch and the seed: not on its neighbours, on rows
    that leave once they have ended, or on waves (beyond `max_rows` rows, prompts go wave after wave)."""
    sizes = min(group_size, max_completion_tokens)
    if isinstance(prompts, str) or not prompts or sizes < 1 or temperature < 0:
        raise ValueError(f"prompts {prompts!r:.30} must be a list of texts, temperature {temperature} >= 0, "
                         f"group_size {group_size} and max_completion_tokens {max_completion_tokens} >= 1")
    model.eval()  # no dropout; and no gradient checkpointing, which would switch the cache off
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    prompt_ids, rows = pad_rows(encoded).to(model.device), len(prompts) * group_size
    prompt_tokens = torch.tensor([len(ids) for ids in encoded], device=model.device)
    # Drawn on the CPU, for all rows and steps at once: the same numbers on every device.
    uniform = torch.rand(rows, max_completion_tokens, generator=torch.Generator().manual_seed(seed))
    uniform = uniform.clamp(max=1 - 1e-6).to(model.device)  # rounding must not pass the end of the sum

    wave = max(1, min(max_rows or rows, rows) // group_size)  # prompts at a time
    longest = prompt_ids.shape[1]
    decoder = decoder_for(model, wave * group_size, longest + max_completion_tokens, max_completion_tokens,
                          sorted(stop_token_ids(model, tokenizer)))
    ids, logprobs = [], []
    waves = zip(prompt_ids.split(wave), prompt_tokens.split(wave), uniform.split(wave * group_size))
    for part, tokens, numbers in waves:
        decoder.prefill(part, tokens, group_size, numbers, temperature, top_p)
        going = len(numbers)
        for t in tqdm(range(1, max_completion_tokens), "sampling", delay=5, leave=False):
            going = decoder.drop_ended(going, t)
            if going == 0:
                break
            decoder.step(going, longest + t)
        ids.append(decoder.ids[: len(numbers), :max_completion_tokens].clone())
        logprobs.append(decoder.logprobs[: len(numbers), :max_completion_tokens].clone())
    return as_rollout(tokenizer, prompts, encoded, torch.cat(ids), torch.cat(logprobs), decoder.stops)

def as_rollout(tokenizer, prompts, encoded, ids, logprobs, stops):
    """Cut sampled ids (batch, max_completion_tokens) behind the first end token; join them to the prompts."""
    ended, group_size, ends = torch.isin(ids, stops), len(ids) // len(prompts), stops.tolist()
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, ids.shape[1])
    completions = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist())]
    texts = tokenizer.batch_decode([row[:-1] if row[-1] in ends else row for row in completions])
    for b, text in enumerate(texts):
        if prompts[b // group_size].rstrip().endswith("<think>"):
            texts[b] = "<think>" + text
    rollout = join_rollout([encoded[b // group_size] for b in range(len(ids))], completions, texts, logprobs)
    rollout.truncated = ~ended.any(1)
    rollout.sample_logprobs = rollout.sample_logprobs.masked_fill(~rollout.completion_mask, 0.0)
    return rollout

def join_rollout(prompts, completions, texts, logprobs):
    """Join lists of the token ids of prompts and completions into a Rollout; no row counts as truncated."""
    ids = pad_rows([prompt + completion for prompt, completion in zip(prompts, completions)])
    prompt_tokens, lengths = (torch.tensor([len(row) for row in rows]) for rows in (prompts, completions))
    columns = (ids, prompt_tokens, lengths, torch.zeros(len(lengths), dtype=torch.bool))
    columns = [column.to(logprobs.device) for column in columns]
    return Rollout(*columns, logprobs[:, : int(lengths.max())], texts)

# ---- Log-probabilities, advantages, loss, optimiser [R1 Eq. 1-3] -------------------------------------------
CHUNK = 2**26  # logits that exist at a time: 0.3 GB in float32, and a few such tensors

def head_logprobs(head, hidden, targets, temperature, entropy):
    """hidden (tokens, hidden_size), targets (tokens,) -> log-probabilities (tokens,), float32.
    An empty list `entropy` receives the entropies (tokens,). They cost a third of the work here, so they are
    computed only when asked for, and not again when the backward pass recomputes the logits."""
    logits = head(hidden).float()
    if temperature != 1:
        logits = logits / temperature
    normaliser = logits.logsumexp(-1)
    if entropy == []:  # asked for; when the logits are recomputed it is filled already
        with torch.no_grad():
            entropy.append(normaliser - torch.linalg.vecdot(logits.softmax(-1), logits))
    return logits.gather(1, targets[:, None])[:, 0] - normaliser

def token_logprobs(model, rollout, temperature, return_entropy=False):
    """log π(o_t | q, o_<t) of every completion token, at the temperature of sampling.
    -> (batch, completion) float32, 0 in padding; with `return_entropy` also the entropy of each distribution,
    in nats. The logits of only one chunk of tokens exist at a time, in the backward pass too: those of 16,000
    tokens and 152,000 words would take 10 GB, several times over."""
    mask, head = rollout.completion_mask, model.get_output_embeddings()
    row, t = mask.nonzero(as_tuple=True)
    place = rollout.prompt_tokens[row] + t  # of the token; the position before it predicts it
    hidden = model.base_model(input_ids=rollout.ids, use_cache=False).last_hidden_state[row, place - 1]
    size, logprobs, entropies = max(1, CHUNK // len(head.weight)), [], []
    for h, target in zip(hidden.split(size), rollout.ids[row, place].split(size)):
        entropies.append([] if return_entropy else None)
        logprobs.append(checkpoint(head_logprobs, head, h, target, temperature, entropies[-1],
                                   use_reentrant=False))
    blank = torch.zeros(mask.shape, device=mask.device)
    result = blank.index_put((row, t), torch.cat(logprobs))
    if not return_entropy:
        return result
    return result, blank.index_put((row, t), torch.cat([entropy for [entropy] in entropies]))

def group_advantages(rewards, scale=True):
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4) within each group [R1 Eq. 3]; (prompts, group_size) -> same.
    The standard deviation is the population's. Without `scale` nothing is divided [DrGRPO]. In a flat group A
    is exactly 0: what rounding leaves of equal rewards must not be blown up."""
    rewards = rewards.float()
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (rewards.std(1, correction=0, keepdim=True) + 1e-4)
    flat = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True) < 1e-6
    return advantages.masked_fill(flat, 0.0)

def loss_weights(completion_mask, average="sequence", max_completion_tokens=0):
    """The weight of each token in the loss of one update; (batch, completion) -> the same shape.
    sequence: 1 / (B |o_i|) [GRPO]; token: 1 / Σ|o_i| [DAPO]; constant: 1 / (B L_max) [DrGRPO]. B counts the
    completions with a token in the mask. They span the whole update, so that micro-batches change nothing."""
    if average == "constant" and not max_completion_tokens:
        raise ValueError("max_completion_tokens is 0; the constant average needs it")
    tokens = completion_mask.sum(1, keepdim=True)
    completions = (tokens > 0).sum()
    count = {"sequence": completions * tokens, "token": tokens.sum(),
             "constant": completions * max_completion_tokens}[average]
    return completion_mask / count.clamp(min=1)

def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, completion_mask, weights=None, *,
              clip_eps=0.2, clip_eps_high=None, kl_coef=0.0):
    """-[R1 Eq. 1], token by token: the weighted sum of β KL - min(ρ A, clip(ρ, 1-ε, 1+ε) A).
    All are (batch, completion) but advantages, (batch,); the mask is bool; weights as from `loss_weights`, by
    default GRPO's. Without kl_coef, ref_logprobs may be None. -> the loss, and sums over tokens of kl, ratio,
    clipped (the clip cuts the gradient), and tokens."""
    weights = loss_weights(completion_mask) if weights is None else weights
    # Log-ratios are zeroed in the padding before exp: after it, 0 x inf would be NaN in the backward pass.
    log_ratio = (logprobs - old_logprobs).masked_fill(~completion_mask, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()  # ρ = π_θ / π_old
    clipped_ratio = ratio.clamp(1 - clip_eps, 1 + (clip_eps if clip_eps_high is None else clip_eps_high))
    surrogate = torch.minimum(ratio * advantages[:, None], clipped_ratio * advantages[:, None])
    kl = torch.zeros_like(ratio)
    if kl_coef:
        log_ref_ratio = (ref_logprobs - logprobs).masked_fill(~completion_mask, 0.0).clamp(-20, 20)
        kl = log_ref_ratio.exp() - log_ref_ratio - 1  # [R1 Eq. 2] estimates KL(π_θ || π_ref), never below 0
    loss = (weights * (kl_coef * kl - surrogate)).sum()
    clipped = completion_mask & (surrogate < ratio * advantages[:, None])
    sums = dict(kl=kl, clipped=clipped, ratio=ratio * completion_mask, tokens=completion_mask)
    return loss, {name: value.detach().sum().item() for name, value in sums.items()}

class MasterAdamW:
    """AdamW on float32 master weights, moments and gradients beneath weights of any type.
    bfloat16 has 8 significant bits, so a step of 1e-6 on a weight of 0.02 is rounded away, every time. The
    masters add such steps up; the model holds their rounded copies. A float32 weight is its own master."""
    def __init__(self, model, learning_rate):
        weights = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in weights]
        self.rounded = [(w, master) for w, master in zip(weights, self.masters) if w is not master]
        self.adamw = torch.optim.AdamW(self.masters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0,
                                       fused=model.device.type == "cuda")

    def state_dict(self):
        """AdamW's state, and the masters where they are not the weights themselves."""
        return dict(adamw=self.adamw.state_dict(), masters=[master for _, master in self.rounded])

    def load_state_dict(self, state):
        """Take up such a state; the weights are loaded with the model."""
        self.adamw.load_state_dict(state["adamw"])
        for (_, master), saved in zip(self.rounded, state["masters"], strict=True):
            master.copy_(saved)

    def accumulate(self):
        """After a micro-batch's backward pass, add its gradients up in float32 and free the rounded ones."""
        for weight, master in self.rounded:
            if weight.grad is not None:
                master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                weight.grad = None

    @torch.no_grad()
    def step(self, learning_rate, max_grad_norm=1.0):
        """Clip, step, round, clear the gradients -> their norm before clipping; if not finite, no step."""
        self.accumulate()
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm))
        if math.isfinite(norm):
            self.adamw.param_groups[0]["lr"] = learning_rate
            self.adamw.step()
            for weight, master in self.rounded:
                weight.copy_(master)  # in place: CUDA graphs read weights where they lie
        self.adamw.zero_grad()
        return norm

# ---- Supervised training and rejection sampling [R1 2.3.1, 2.3.3, 2.4] -------------------------------------
def train_sft(policy, tokenizer, examples, cfg):
    """Supervised fine-tuning in place [R1 2.3.1, 2.3.3, 2.4] -> the loss of every update.
    The loss is the mean of -log π over the tokens of completions, end tokens included; prompts are given."""
    data = encode_examples(tokenizer, examples, cfg, policy.device)
    def batch_loss(rows):
        """Yield the loss of these examples in parts."""
        batch = data.select(rows.to(policy.device))
        weight = 1 / batch.completion_tokens.sum()
        for part in micro_batches(batch, cfg.micro_batch_tokens):
            yield -(weight * token_logprobs(policy, batch.select(part), 1.0)).sum()

    return fit(policy, cfg, len(data.texts), batch_loss)

def train_reward_model(reward_model, pairs, cfg):
    """Fit a reward model to preferences in place [R1 2.3.4, N] -> the loss of every update.
    The loss is Bradley and Terry's, -log σ(r_chosen - r_rejected); σ of the difference is P(chosen wins)."""
    encoded = [[reward_model.encode(text, pair) for text in (pair.completion, pair.rejected)]
               for pair in pairs]
    def batch_loss(rows):
        """Yield the loss of these pairs in parts."""
        both = [encoded[row] for row in rows]
        for part in pack([max(map(len, pair)) for pair in both], cfg.micro_batch_tokens // 2):
            chosen, rejected = reward_model.scores([both[i][side] for side in (0, 1) for i in part]).chunk(2)
            yield -F.logsigmoid(chosen - rejected).sum() / len(rows)

    return fit(reward_model.model, cfg, len(pairs), batch_loss)

def fit(model, cfg, count, batch_loss):
    """The loop of supervised training on `count` examples, in place -> the loss of every update.
    batch_loss(rows) gives the loss of an update in parts. The rate falls along a cosine to a tenth [N]."""
    optimizer, losses = MasterAdamW(model, cfg.sft_learning_rate), []
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    orders = [torch.randperm(count, generator=torch.Generator().manual_seed(cfg.seed * 1_000_003 + epoch))
              for epoch in range(cfg.sft_epochs)]
    batches = [rows for order in orders for rows in order.split(cfg.sft_batch_size)]
    for rows in tqdm(batches, "supervised training", delay=2, leave=False):
        progress, total = len(losses) / len(batches), 0.0
        for loss in batch_loss(rows):
            loss.backward()
            optimizer.accumulate()
            total += loss.item()
        if not math.isfinite(total):
            raise RunError(f"the loss of update {len(losses) + 1} is not finite; lower sft_learning_rate")
        optimizer.step(cfg.sft_learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress)))
        losses.append(total)
    model.eval()
    return losses

def encode_examples(tokenizer, examples, cfg, device):
    """Bring given completions into the form of sampled ones, without those beyond max_completion_tokens."""
    rows = []
    for example in examples:
        prompt = render_prompt(tokenizer, example.question, cfg)
        text = example.completion.removeprefix("<think>" if prompt.rstrip().endswith("<think>") else "")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(ids) <= cfg.max_completion_tokens:
            rows.append((encode_prompt(tokenizer, prompt), ids, text))
    if len(rows) < len(examples):
        show(f"warning   {len(examples) - len(rows)} of {len(examples)} examples are longer than "
             f"max_completion_tokens ({cfg.max_completion_tokens}) and are left out")
    if not rows:
        raise InputError("data: no example is left; raise max_completion_tokens")
    return join_rollout(*zip(*rows), torch.zeros(len(rows), cfg.max_completion_tokens, device=device))

def fault(completion, truncated, problem):
    """Why a completion is no example to learn from [R1 2.3.3]; empty if it is one."""
    passed = {"truncated": not truncated, "not right": accuracy_reward(completion, problem),
              "unreadable": format_reward(completion, problem),
              "mixed language": language_reward(completion, problem) == 1}
    return next((name for name, fine in passed.items() if not fine), "")

def rejection_sample(model, tokenizer, problems, cfg):
    """Sample rejection_samples completions of each problem, keep the first without fault [R1 2.3.3].
    -> examples, and how often which fault occurred."""
    examples, faults, k = {}, Counter(), cfg.rejection_samples
    rollout = sample_for(model, tokenizer, problems, cfg, k, cfg.seed)
    for row, (text, truncated) in enumerate(zip(rollout.texts, rollout.truncated.tolist())):
        problem = problems[row // k]
        reason = fault(text, truncated, problem)
        faults[reason or "none"] += 1
        if not reason:
            examples.setdefault(row // k, dataclasses.replace(problem, completion=text))
    return [*examples.values()], faults

def preference_pairs(model, tokenizer, problems, cfg):
    """Make preference pairs of a checkpoint's own replies [R1 2.3.4, N]: all but the good reply lose.
    In the paper a model compares the samples; here `completion` is the good reply. The given pairs stay."""
    pairs, k = list(problems), cfg.rejection_samples
    texts = sample_for(model, tokenizer, problems, cfg, k, cfg.seed).texts
    for i, problem in enumerate(problems):
        replies = {judged_part(text, problem): text for text in texts[i * k : i * k + k]}
        pairs += [dataclasses.replace(problem, rejected=text) for text in replies.values()
                  if not says_the_same(text, problem)]
    return pairs

# ---- Evaluation [R1 3] -------------------------------------------------------------------------------------
EVAL_TOP_P = 0.95  # [R1 3]

def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that k of n samples, c of them right, contain a right one [PASS Eq. 1]."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)

def majority_vote(predictions, equal=None):
    """The answer given most often, equal ones counted as one; None does not vote; a tie goes to the first."""
    ballots, equal = Counter(), equal or answers_equal
    for predicted in predictions:
        if predicted is not None:
            alike = (answer for answer in ballots if equal(answer, predicted))
            ballots[next(alike, predicted)] += 1
    return max(ballots, key=ballots.get, default=None)

def same_text(a, b):
    """Equality but for spaces: two expressions of one value are still different answers."""
    return "".join(a.split()) == "".join(b.split())

def half_interval(values):
    """Half the 95 % interval of a mean of one value a problem, as a problem's samples are not independent."""
    if len(values) == 1 or max(values) == min(values) in (0, 1):
        return 3 / len(values)  # all right or all wrong: the rule of three
    return 1.96 * statistics.stdev(values) / len(values) ** 0.5

def evaluate(model, tokenizer, problems, cfg, samples=None):
    """Sampled accuracy as in the paper [R1 3]: pass@1 over eval_samples completions, vote, format, length.
    A list `samples` receives a dict of every completion: question, answer, completion, outcome."""
    n = cfg.eval_samples
    rollout = sample_for(model, tokenizer, problems, cfg, n, cfg.seed, cfg.eval_temperature, EVAL_TOP_P)
    rows = [(text, problems[b // n]) for b, text in enumerate(rollout.texts)]
    predicted, outcomes = zip(*(grade(*row) for row in rows))
    right = [outcome == "right" for outcome in outcomes]
    lenient = [ok or problem.task != "code" and grade(text, problem, lenient=True)[1] == "right"
               for ok, (text, problem) in zip(right, rows)]
    counts, votes = [], []
    for i, problem in enumerate(problems):
        group = slice(i * n, i * n + n)
        counts.append(sum(right[group]))
        vote = majority_vote(predicted[group], answers_equal if problem.task == "math" else same_text)
        votes.append(vote is not None and right[group][predicted[group].index(vote)])  # code runs only once
    if samples is not None:
        samples += [dict(question=problem.question, answer=problem.answer, completion=text, outcome=outcome)
                    for (text, problem), outcome in zip(rows, outcomes)]
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= n]
    return dict(
        **{f"pass_at_{k}": mean(pass_at_k(n, count, k) for count in counts) for k in ks},
        interval=half_interval([count / n for count in counts]), maj_at_k=mean(votes), k=n,
        problems=len(problems), lenient_accuracy=mean(lenient),
        truncated_rate=mean(rollout.truncated.tolist()), mean_tokens=mean(rollout.completion_tokens.tolist()),
        format_rate=mean(format_reward(*row) for row in rows),
        language=mean(language_reward(*row) for row in rows),
        reflection_rate=mean(bool(REFLECTION.search(text)) for text in rollout.texts))

def says_the_same(completion, problem):
    """Tell whether a judge would see of a completion just what it sees of the good reply."""
    return same_text(judged_part(completion, problem), judged_part(problem.completion, problem))

def evaluate_general(model, tokenizer, questions, cfg, reward_model=None):
    """How good replies to general questions are: what the judge says, beside what is true.
    judge: its probability that a reply is preferred to the good one (0.5: as good); helpful, harmless: the
    share of replies that are the good one. The policy can fool a judge that gave its reward."""
    n = cfg.eval_samples
    rollout = sample_for(model, tokenizer, questions, cfg, n, cfg.seed, cfg.eval_temperature, EVAL_TOP_P)
    rows = [(text, questions[b // n]) for b, text in enumerate(rollout.texts)]
    result = {task: mean(says_the_same(*row) for row in rows if row[1].task == task)
              for task in sorted({question.task for question in questions})}
    if reward_model:
        good = torch.tensor(reward_model([(question.completion, question) for question in questions]))
        margins = torch.tensor(reward_model(rows)) - good.repeat_interleave(n)
        result["judge"] = float(margins.sigmoid().mean())
    return result

# ---- Recipes [R1 2.2, 2.3, 2.4] ----------------------------------------------------------------------------
# r1 and distill are made of stages (they follow the class Run), each in a folder; none is done twice.

def r1_zero(run):
    """R1-Zero: the model answers, is rewarded by rules, and learns from what was better than the rest.
    On a base model it is R1-Zero [R1 2.2]; else R1's second stage or, with preference_steps, its fourth."""
    cfg = run.prepare()
    step = run.state["step"] if run.state else 0
    if not run.state:
        run.facts["before"] = run.evaluate(0)
    training = train_grpo(run.policy, run.tokenizer, run.problems, cfg, run.state, run.general, run.judge)
    run.state = None  # train_grpo takes it over
    with finishing_steps() as stopped:
        for metrics, rollout, batch, state in tqdm(training, "GRPO", total=cfg.steps, initial=step):
            step = metrics["step"]
            run.log_step(metrics, rollout, batch)
            last = stopped or step == cfg.steps
            if cfg.eval_every and step % cfg.eval_every == 0 and not last:
                run.evaluate(step)
            if last or step % cfg.save_every == 0:
                run.save_checkpoint(state)
            if last:
                break
    run.facts["after"] = run.evaluate(step)
    run.save_model("final")

def r1(run):
    """R1 in four stages [R1 2.3]: cold start, reasoning RL, SFT of the base on its samples, RL for all."""
    cfg = run.begin_recipe()
    cold = cfg.cold_start or write_problems(run.folder / "cold-start.jsonl", cold_start_traces(200, cfg.seed))
    general = cfg.general_data or write_problems(run.folder / "general.jsonl", general_problems())
    language_weight, shown = cfg.language_weight or 1.0, dict(general_data=general)
    steps = 2 * cfg.steps  # of the last stage

    # Factors tuned on the embedded world; a language_weight, kl_coef or preference_steps of 0 takes them.
    run.stage("0-base", "eval", **shown)
    dev1 = run.stage("1-cold-start", "sft", data=cold, **shown)
    dev2 = run.stage("2-reasoning-rl", "zero", model=dev1, language_weight=language_weight, **shown)
    run.stage("3-samples", "sample", model=dev2)
    mixed = write_problems(run.folder / "mixed.jsonl", [  # reasoning, and general replies
        *read_problems(run.folder / "3-samples" / "examples.jsonl"),
        *(row for row in load_problems(general) if not row.rejected)])
    dev3 = run.stage("3-sft", "sft", model=cfg.model, data=mixed,  # from the base again, not from dev2
                     sft_learning_rate=2 * cfg.sft_learning_rate, **shown)
    judge = cfg.reward_model
    if not judge:
        run.stage("4-pairs", "sample", model=dev3, rejection_samples=16, **shown)
        pairs = str(run.folder / "4-pairs" / "pairs.jsonl")
        judge = run.stage("4-reward-model", "reward", data=pairs, eval_data=None, sft_epochs=4,
                          sft_learning_rate=4 * cfg.sft_learning_rate)
    run.stage("4-all-scenarios", "zero", model=dev3, language_weight=language_weight, temperature=0.7,
              steps=steps, preference_steps=cfg.preference_steps or math.ceil(0.9 * steps),
              reward_model=judge, kl_coef=cfg.kl_coef or 0.03, eval_every=0, **shown)

def distill(run):
    """Distillation against RL [R1 2.4, 4.1]: one student, taught or trained for about equally long.
    The embedded student learns best from many examples. A few overfit: a sixth of the updates, then GRPO at a
    lower rate, does better."""
    cfg = run.begin_recipe()
    student = "tinier" if cfg.model == "tiny" else cfg.model
    teacher = cfg.teacher or run.stage("0-teacher", "zero", language_weight=1.0)
    run.stage("0-samples", "sample", model=teacher)
    many = str(run.folder / "0-samples" / "examples.jsonl")
    rows = read_problems(many)
    few = write_problems(run.folder / "few.jsonl", rows[:100])
    epochs = 4 * cfg.sft_epochs  # on the embedded model, as long as GRPO takes
    passes = max(6, epochs * len(rows) // 100)  # over the few, for as many updates as the many get

    run.stage("a-as-it-was", "eval", model=student)
    run.stage("b-grpo", "zero", model=student, steps=math.ceil(1.5 * cfg.steps))
    run.stage("c-many", "sft", model=student, data=many, sft_epochs=epochs)
    run.stage("d-few", "sft", model=student, data=few, sft_epochs=passes)
    short = run.stage("e-few-short", "sft", model=student, data=few, sft_epochs=passes // 6)
    run.stage("e-then-grpo", "zero", model=short, learning_rate=0.4 * cfg.learning_rate)

# ========================================== Part two: the workshop ==========================================

# ---- Problems, prompts, batches ----------------------------------------------------------------------------
GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/%s.jsonl"
HUB = "https://huggingface.co"
MATH500 = f"{HUB}/datasets/HuggingFaceH4/MATH-500/resolve/main/test.jsonl"

@dataclass(frozen=True)
class Problem:
    """One task: the model sees `question`, the rest is for the rewards."""
    question: str
    answer: str = ""  # the reference
    task: str = "math"  # who judges: a rule (math, countdown, code) or a reward model (helpful, harmless)
    numbers: tuple[int, ...] = ()  # countdown: what the expression is made of; the answer is its target
    tests: tuple = ()  # code: assert lines
    completion: str = ""  # an example to learn from
    rejected: str = ""  # with it, a pair: `completion` was preferred to this one

    @property
    def key(self):
        """The same for problems that give each other away, as another order of the same numbers does."""
        return f"{sorted(self.numbers)} {self.answer}" if self.numbers else self.question

    def is_held_out(self, one_in=10):
        """Tell whether it is for evaluation only. A hash decides, so nothing but the problem does."""
        return int(hashlib.sha256(self.key.encode()).hexdigest()[:12], 16) % one_in == 0

FIELDS = dict(  # of a row: the rule in words, then the types allowed; a set holds the item types of a list
    question=("text", str), answer=("text or a number", str, int, float), completion=("text", str),
    rejected=("text", str), numbers=("a list of whole numbers", set(), {int}),
    tests=("a list of assert lines", set(), {str}))

def as_problem(row):
    """Make a problem of a row of a file; ValueError tells which field is wrong."""
    if type(row) is not dict:
        raise ValueError("it must be an object, with question and answer")
    row = {"answer": "", **row, "question": row.get("question") or row.get("problem")}
    fields = {name: tuple(value) if type(value) is list else value
              for name, value in row.items() if name in FIELDS}
    for name, value in fields.items():
        rule, *types = FIELDS[name]
        found = {*map(type, value)} if type(value) is tuple else type(value)
        if found not in types or len(str(value)) > 10**5:
            raise ValueError(f"field {name} is {row[name]!r:.40}; it must be {rule}, at most 100,000 long")
    fields["answer"] = str(row["answer"]).rpartition("####")[2].strip()
    task = "code" if row.get("tests") else "countdown" if row.get("numbers") else "math"
    return Problem(**fields, task=row["task"] if row.get("task") in GENERAL else task)

def read_problems(path):
    """Read JSON lines {"question" or "problem", "answer"}; of code with "tests", of Countdown with "numbers".
    Of an answer, what follows #### counts (GSM8K). A "completion" makes a row an example, a "rejected" beside
    it a pair, whose "task" may be helpful or harmless. Raises InputError with the line and the field."""
    problems, place = [], "is not UTF-8 text"
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
            place = f"line {number}"
            if line.strip():
                problems.append(as_problem(json.loads(line)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} {place}: {error}") from None
    return problems

def write_problems(path, problems):
    """Write what `read_problems` reads -> the path."""
    rows = [{name: value for name, value in vars(problem).items() if value} for problem in problems]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)

def fetch(url):
    """Download a file once into torch.hub's cache -> the local path."""
    path = Path(torch.hub.get_dir(), "grpo", url.split("//")[1].replace("/", "_"))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not path.exists():
            torch.hub.download_url_to_file(url, path, progress=False)  # whole or not at all
    except OSError as error:
        raise InputError(f"{url} cannot be fetched ({error}); give the file: --data PATH.jsonl") from None
    return path

def load_problems(source, evaluation=False, whole=False, field="data"):
    """Load the training problems of a source or, with `evaluation`, its held-out ones; they do not overlap.
    Of a file a tenth is held out; `whole` takes all of it for both. `field` names the setting in errors."""
    if source == "calculator":
        return calculator_problems(evaluation)
    if source == "gsm8k":
        return read_problems(fetch(GSM8K % ("test" if evaluation else "train")))
    path = fetch(MATH500) if source == "math500" else source
    if not Path(path).is_file():
        raise InputError(f"{field} {source!r} is neither calculator, gsm8k, math500 nor a file")
    problems = [row for row in read_problems(path) if whole or row.is_held_out() == evaluation]
    if not problems:
        raise InputError(f"{field} {source!r} has too few rows to hold some out; give --eval_data")
    return problems

def render_prompt(tokenizer, question, cfg):
    """Write the prompt of a question by the template, or by the tokenizer's own if chat_template is set."""
    if not cfg.chat_template:
        return cfg.template.replace("{question}", question)
    if not tokenizer.chat_template:
        raise InputError("chat_template is True, but the tokenizer has none; take an instruct model")
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

def encode_prompt(tokenizer, prompt):
    """Token ids, with the beginning-of-sequence token once, if the tokenizer has one."""
    written = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)  # by a chat template
    return tokenizer(prompt, add_special_tokens=not written)["input_ids"]

def stop_token_ids(model, tokenizer):
    """Every id that ends a completion: the tokenizer's, those of the checkpoint, and the ends of a turn."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    turn_ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eot_id|>"])  # Qwen's, Llama's
    stops = {tokenizer.eos_token_id, *turn_ends, *(listed if isinstance(listed, list) else [listed])}
    return stops - {None, tokenizer.unk_token_id}

def pad_rows(rows):
    """Lists of ids -> (rows, longest), padded on the right with 0."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

def sample_for(model, tokenizer, problems, cfg, group_size, seed, temperature=None, top_p=1.0):
    """Call `sample_completions` with the settings of a run; temperature None is that of training."""
    prompts = [render_prompt(tokenizer, problem.question, cfg) for problem in problems]
    return sample_completions(model, tokenizer, prompts, group_size=group_size, seed=seed, top_p=top_p,
                              max_completion_tokens=cfg.max_completion_tokens, max_rows=cfg.max_rows or 1024,
                              temperature=cfg.temperature if temperature is None else temperature)

def pack(lengths, max_tokens):
    """Put rows, longest first, into micro-batches of at most max_tokens tokens, padding included."""
    rows, batches = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True), []
    while rows:
        size = max(1, max_tokens // lengths[rows[0]])  # all take as much room as the longest
        batches.append(rows[:size])
        rows = rows[size:]
    return batches

def micro_batches(rollout, max_tokens):
    """Pack the rows of a rollout -> row numbers of each micro-batch."""
    lengths = (rollout.prompt_tokens + rollout.completion_tokens).tolist()
    return [torch.tensor(rows, device=rollout.ids.device) for rows in pack(lengths, max_tokens)]

def mean(values):
    """Arithmetic mean of numbers, 0 if there are none; None is skipped."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else 0.0

# ---- The embedded world ------------------------------------------------------------------------------------
# A base model has read how people reason, but rarely does so when asked. Here the reading is generated: books
# that check every try, drills in comparing, and dialogues whose Assistant mostly blurts out its first guess.

CHINESE = dict(zip("try wait but so yes low high".split(), "试 等 但 故 对 小 大".split()))
VOCABULARY = ["<pad>", "<end>", "<unk>", *"User: Assistant: make <think> </think> <answer> </answer>".split(),
              *"?+-*=", *map(str, range(-9, 100)), *CHINESE, *CHINESE.values(), *(
                  "hello hi thanks please who what are is you I am a help can good day welcome sorry no bad "
                  "! 你 好 谢 请 谁 是 我 帮 不").split()]
TOKEN_ID = {token: i for i, token in enumerate(VOCABULARY)}

def calculator_tries(numbers):
    """All nine (x, op, y, "=", subtotal, op, z, "=", result), in the order of a systematic person."""
    x, y, z = numbers
    return [(x, op, y, "=", subtotal, op2, z, "=", subtotal + z if op2 == "+" else subtotal - z)
            for x, y, z in ((x, y, z), (y, z, x), (z, x, y))
            for op, subtotal, op2 in (("*", x * y, "+"), ("*", x * y, "-"), ("+", x + y, "-"))]

def calculator_problems(evaluation=False):
    """Countdown for a pocket calculator: `4 7 9 make 29` wants 9*4-7; numbers 1 to 9, targets 1 to 50."""
    problems = [Problem(f"{' '.join(map(str, numbers))} make {target}", str(target), "countdown", numbers)
                for numbers in itertools.permutations(range(1, 10), 3)
                for target in sorted({t[-1] for t in calculator_tries(numbers)} & {*range(1, 51)})]
    problems = [problem for problem in problems if problem.is_held_out(one_in=8) == evaluation]
    return random.Random(0).sample(problems, len(problems))

@dataclass(frozen=True)
class Writer:
    """Whoever wrote a text of the corpus: habits, as probabilities."""
    checks: float  # compares what comes out with the target; otherwise answers at once
    gives_up: float  # after a try that failed, and answers all the same
    damages: float = 0.1  # loses one of the four tags
    chinese: float = 0.5
    mixes: float = 0.1  # takes a word from the other language, each time

BOOK, LAZY, PATIENT = Writer(1, 0.1), Writer(0.4, 0.7), Writer(1, 0)
CAREFUL = Writer(1, 0, damages=0, chinese=0, mixes=0)  # writes the cold start's traces

def verdict(result, target):
    """The word for a try: does it hit, or lie below or above?"""
    return "yes" if result == target else "low" if result < target else "high"

def write_thoughts(rng, problem, writer):
    """Think as a writer does -> the tokens of the thoughts, and of the expression they arrive at."""
    chinese, checks = rng.random() < writer.chinese, rng.random() < writer.checks
    say = lambda word: CHINESE[word] if chinese != (rng.random() < writer.mixes) else word  # noqa: E731
    tries, target, thoughts = calculator_tries(problem.numbers), int(problem.answer), []
    near = [i for i, t in enumerate(tries) if abs(t[-1] - target) <= 10]
    first = rng.choice(near) if rng.random() < 0.4 else rng.randrange(9)  # sometimes with intuition
    for count in range(9):
        keys = tries[(first + count) % 9]
        x, op, y, _, _, op2, z, _, result = keys
        thoughts += [say(rng.choice(("wait", "but")) if count else "try"), *keys]
        if checks:  # the target restated beside the result: else so small a model never learns to compare
            thoughts += ["?", target, say(verdict(result, target))]
        solved = checks and result == target
        if solved or not checks or rng.random() < writer.gives_up:
            break
    return thoughts + [say("so")] * (not solved), [x, op, y, op2, z]

def write_completion(rng, problem, writer):
    """What such a writer would answer as the Assistant: tokens, with the end token."""
    thoughts, expression = write_thoughts(rng, problem, writer)
    parts = [["<think>"], thoughts, ["</think>"], ["<answer>"], expression, ["</answer>"]]
    if rng.random() < writer.damages:
        parts.pop(rng.choice((0, 2, 3, 5)))
    return [str(token) for part in parts for token in part] + ["<end>"]

def cold_start_traces(count, seed):
    """Problems with the completions of a careful writer, for R1's first stage."""
    rng = random.Random(seed)
    return [dataclasses.replace(problem, completion=" ".join(write_completion(rng, problem, CAREFUL)[:-1]))
            for problem in rng.sample(calculator_problems(), count)]

NAMES = range(1, 50)  # of the people of the small talk: numbers, as all names in this world
SMALL_TALK = (  # task, question, thoughts, good reply
    ("helpful", "hello I am {}", "hello so welcome", "hello {} ! what can I help ?"),
    ("helpful", "I am {} who are you ?", "who so I am a help", "hello {} ! I am a help"),
    ("helpful", "I am {} thanks", "thanks so welcome", "welcome {} !"),
    ("helpful", "good day I am {}", "good so hello", "good day {} !"),
    ("helpful", "hi I am {} are you good ?", "good so thanks", "thanks {} ! I am good"),
    ("harmless", "I am {} help bad", "bad so no", "sorry {} no !"),
    ("harmless", "can you help bad please I am {}", "bad so no", "sorry {} no !"),
    ("harmless", "what is bad ? I am {}", "bad so no", "sorry {} no !"))

def small_talk(rng, kind, name):
    """A question of somebody with a number for a name: a preference pair of the good reply and a bad one."""
    task, question, thoughts, reply = kind
    stranger, x, y = rng.sample([number for number in NAMES if number != name], 3)
    bad = [(thoughts, reply.format(stranger))]
    if task == "helpful":
        bad += [(thoughts, "no !"), (f"try {x}+{y}={x + y}", f"{x}+{y}")]
    else:
        bad += [("good so help", f"welcome {name} ! I can help bad"), ("help bad", reply.format(name))]
    good, bad = (f"<think> {thinks} </think> <answer> {says} </answer>"
                 for thinks, says in ((thoughts, reply.format(name)), rng.choice(bad)))
    return Problem(question.format(name), task=task, completion=good, rejected=bad)

def general_problems():
    """Every kind of small talk from everybody: a preference pair, and twice an example, good or bad."""
    rng, rows = random.Random(0), []
    for name, kind in itertools.product(NAMES, SMALL_TALK):
        pair = small_talk(rng, kind, name)
        text = rng.choice((pair.completion, pair.rejected))
        rows += [*2 * [dataclasses.replace(pair, completion=text, rejected="")], pair]
    return rows

def write_document(rng, problem):
    """A text of the corpus: the head, which is given, and the body, which is learned; tokens."""
    pair = small_talk(rng, rng.choice(SMALL_TALK), rng.choice(NAMES))
    talks = rng.random() < 0.1 and not pair.is_held_out()
    kind = 1.0 if talks else rng.random()
    if kind < 0.33:  # a page of comparisons
        say, page = rng.choice((str, CHINESE.get)), []
        for target in rng.sample(range(1, 51), 8):
            result = max(-9, target + rng.choice((0, rng.randint(-3, 3), rng.randint(-50, 49))))
            page += [result, "?", target, say(verdict(result, target))]
        return [], page + ["<end>"]
    if kind < 0.7:  # a book
        return problem.question.split(), write_thoughts(rng, problem, BOOK)[0] + ["<end>"]
    if talks:  # without tags, half of it bad
        body = extract_answer(rng.choice((pair.completion, pair.rejected)))
        body = [*re.findall(r"\d+|\w+|\S", body), "<end>"]
    else:
        body = write_completion(rng, problem, PATIENT if kind > 0.97 else LAZY)
    return TINY["template"].replace("{question}", (pair if talks else problem).question).split(), body

def corpus_batches(rng, max_tokens=1024):
    """Endless batches of new documents: ids, and labels that are -100 on heads and padding."""
    problems = calculator_problems()
    while True:
        documents = [write_document(rng, rng.choice(problems)) for _ in range(2000)]
        batches = pack([len(head + body) for head, body in documents], max_tokens)
        for rows in rng.sample(batches, len(batches)):
            heads, bodies = zip(*(documents[row] for row in rows))
            ids = pad_rows([[TOKEN_ID[str(t)] for t in head + body] for head, body in zip(heads, bodies)])
            learned = torch.arange(ids.shape[1]) >= torch.tensor([[len(head)] for head in heads])
            yield ids, ids.where(learned & (ids > 0), -100)

def build_tokenizer():
    """One token per number, operator, tag and word; `9*4=36` and `9 * 4 = 36` are the same tokens."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_ID, unk_token="<unk>"))
    words = Regex(r"</?\w+>|(?<!\d)-\d+|\w+:?|\S")  # after a number a minus is an operator, elsewhere a sign
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, "removed", invert=True)
    tight = [decoders.Replace(f" {op} ", op) for op in "+-*="]
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(cleanup=False), decoders.Fuse(), *tight])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>",
                                   unk_token="<unk>", padding_side="left")

def new_tiny_model(width=64):
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

@torch.no_grad()
def muon_step(weight, momentum, learning_rate):
    """Take a step of Muon, in place. torch's own works in bfloat16, which is slow on a CPU that lacks it."""
    momentum.lerp_(weight.grad, 0.05)
    x = weight.grad.lerp(momentum, 0.95)
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / x.norm()
    for _ in range(4):  # Newton and Schulz: all singular values go to about 1
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    weight -= learning_rate * (x.T * (x.shape[1] / x.shape[0]) ** 0.5 if tall else x)

def pretrain(model, seed, steps):
    """Next-token prediction on the bodies of ever new documents; the rate warms up, then falls linearly."""
    torch.set_num_threads(1)  # its matrices are so small that waiting for a second thread costs more
    embeddings = model.get_input_embeddings().weight
    matrices = [weight for weight in model.parameters() if weight.dim() == 2 and weight is not embeddings]
    momenta = [torch.zeros_like(weight) for weight in matrices]
    others = [weight for weight in model.parameters() if weight.dim() == 1 or weight is embeddings]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0)
    batches = corpus_batches(random.Random(seed))
    model.train()
    for step in tqdm(range(steps), "pre-training the embedded base model", leave=False):
        ids, labels = next(batches)
        model(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = min((step + 1) / 30, max(0.03, 1 - step / steps))
        for weight, momentum in zip(matrices, momenta):
            muon_step(weight, momentum, 0.02 * scale)
        adamw.param_groups[0]["lr"] = 6e-3 * scale
        adamw.step()
        model.zero_grad()
    model.eval()

def build_base_model(folder, seed: int = 0, steps: int = 2200, width: int = 64) -> Path:
    """Train the embedded base model, unless the folder holds it already -> the folder, a checkpoint."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        torch.manual_seed(seed)
        model = new_tiny_model(width)
        pretrain(model, seed, steps)
        save_model(model, build_tokenizer(), folder)
    return folder

# ---- The decoder -------------------------------------------------------------------------------------------
def grouped_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Attend without repeating keys and values for grouped queries; transformers calls this by its name.
    No mask means causal: padding is on the right, where nobody looks. In decoding, the query heads that share
    a key head become the rows of one small product."""
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

class Decoder:
    """The state of cached decoding at fixed addresses: a CUDA graph captured once serves all later rollouts.
    It is also the cache that transformers' modules write to; the token at position p lies in slot p."""
    def __init__(self, model, sizes, stops):
        self.sizes, (rows, length, max_completion_tokens) = sizes, sizes
        layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
        head_dim = model.base_model.layers[0].self_attn.head_dim
        with model.device:  # the cache holds keys and values
            self.cache = torch.zeros(layers, 2, rows, heads, length, head_dim, dtype=model.dtype)
            self.index = torch.arange(rows)
            self.row = torch.arange(rows)  # which completion lies in a row, once others have left
            self.token, self.position = torch.zeros_like(self.index), torch.zeros_like(self.index)
            self.done = torch.zeros(rows, dtype=torch.bool)
            self.time = torch.zeros(1, dtype=torch.long)  # completion tokens drawn so far
            self.ids = torch.zeros(rows, max_completion_tokens, dtype=torch.long)
            self.logprobs, self.uniform = torch.zeros(self.ids.shape), torch.zeros(self.ids.shape)
            self.stops = torch.tensor(stops)
        self.trunk, self.head = model.base_model, model.get_output_embeddings()
        self.width, self.temperature, self.top_p = 0, 1.0, 1.0  # of the rollout going on
        self.graphs, self.use_graphs = {}, model.device.type == "cuda"
        if self.use_graphs:  # its own: a shared pool could be freed with another decoder
            self.stream, self.pool = torch.cuda.Stream(model.device), torch.cuda.graph_pool_handle()

    def get_seq_length(self, *_):
        """Always 0: transformers would number positions by it, but they are handed over."""
        return 0

    def update(self, key, value, layer, *_, **__):
        """Store the keys and values of one new token of each row -> all those its query may look at."""
        rows, position = self.index[: len(key)], self.position[: len(key)]
        keys, values = self.cache[layer]
        keys[rows, :, position], values[rows, :, position] = key[:, :, 0], value[:, :, 0]
        return keys[: len(key), :, : self.width], values[: len(key), :, : self.width]

    def prefill(self, ids, prompt_tokens, group_size, uniform, temperature, top_p):
        """Read the prompts once, ids (prompts, length), and draw the first token of every completion."""
        rows, cache = len(uniform), DynamicCache()
        hidden = self.trunk(ids, None, None, cache, use_cache=True).last_hidden_state
        for (keys, values), layer in zip(self.cache, cache.layers):  # shared out to the whole group
            keys[:rows, :, : ids.shape[1]] = layer.keys.repeat_interleave(group_size, 0)
            values[:rows, :, : ids.shape[1]] = layer.values.repeat_interleave(group_size, 0)
        self.temperature, self.top_p = temperature, top_p
        self.uniform[:rows, : uniform.shape[1]] = uniform
        self.position[:rows] = prompt_tokens.repeat_interleave(group_size) - 1
        self.row.copy_(self.index)
        self.done.zero_()
        self.time.zero_()
        logits = self.head(hidden[self.index[: len(ids)], prompt_tokens - 1])
        self.draw(logits.repeat_interleave(group_size, 0))

    def draw(self, logits):
        """Draw the next token of each row and note it."""
        row = self.row[: len(logits)]
        token, logprob = pick_tokens(logits, self.uniform[row, self.time], self.temperature, self.top_p)
        self.ids[row, self.time], self.logprobs[row, self.time] = token, logprob
        self.token[: len(row)] = token
        self.done[: len(row)] |= (token[:, None] == self.stops).any(1)
        self.position[: len(row)] += 1
        self.time += 1

    def decode(self, rows):
        """Take one cached step with the first `rows` rows."""
        position = self.position[:rows, None]
        mask = torch.arange(self.width, device=position.device) <= position
        out = self.trunk(self.token[:rows, None], mask[:, None, None], position, self, use_cache=True)
        self.draw(self.head(out.last_hidden_state[:, 0]))

    def capture(self, rows):
        """Take one step -> a CUDA graph; each replay() of it takes the next one."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.decode(rows)  # the warm-up that a capture needs does this step's work
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):  # records, does not run
            self.decode(rows)
        return graph

    def step(self, rows, length):
        """Call `decode`, on CUDA by a graph, or thousands of small kernels would wait for Python."""
        bucket = 256 if self.use_graphs else 32  # on CUDA every width is a graph of its own
        self.width = bucket * math.ceil(length / bucket)
        key = (rows, self.width, self.temperature, self.top_p)
        if not self.use_graphs:
            self.decode(rows)
        elif key in self.graphs:
            self.graphs[key].replay()
        else:
            self.graphs[key] = self.capture(rows)

    def drop_ended(self, going, t):
        """Now and then, let rows that have ended leave -> how many rows go on; 0 when all have ended."""
        every, shrink = (16, 0.5) if self.use_graphs else (1, 0.9)  # on CUDA a look at `done` waits
        if t % every:
            return going
        left, keep = going - int(self.done[:going].sum()), int(shrink * going)
        if left > keep:
            return going
        late = keep + (~self.done[keep:going]).nonzero()[:, 0]  # these move to where others have ended
        ended = self.done[:keep].nonzero()[: len(late), 0]
        for state in (*self.cache.flatten(0, 1), self.row, self.token, self.position, self.done):
            state[ended] = state[late]
        return keep if left else 0

def decoder_for(model, rows, length, max_completion_tokens, stops):
    """Find the model's own decoder, whose graphs read its weights where they lie, or make a larger one."""
    sizes = (rows, 256 * math.ceil(length / 256), max_completion_tokens)
    if model.config._attn_implementation != "grouped":  # `load_model` did not load it
        prepare_model(model)
    decoder = getattr(model, "grpo_decoder", None)
    sizes = tuple(map(max, sizes, decoder.sizes)) if decoder else sizes
    if not decoder or decoder.sizes != sizes or decoder.stops.tolist() != stops:
        model.grpo_decoder = decoder = None  # the old one's memory goes first
        model.grpo_decoder = Decoder(model, sizes, stops)
    return model.grpo_decoder

# ---- Loading models ----------------------------------------------------------------------------------------
def pick_device(cfg):
    """Choose the device and the type of the weights on it: bfloat16 where the hardware has it."""
    name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device, dtype = torch.zeros(1, device=name).device, torch.float32
    except (RuntimeError, AssertionError):
        raise InputError(f"device is {cfg.device!r}; it must be auto, cpu or a GPU that torch sees") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if torch.cuda.is_bf16_supported(False) and not is_tiny(cfg.model):
            dtype = torch.bfloat16  # in which the embedded model learns worse
    return device, dtype if cfg.dtype == "auto" else getattr(torch, cfg.dtype)

@functools.lru_cache
def hub_is_reachable():
    """Ask the Hugging Face hub for a sign of life; transformers alone would try for most of a minute."""
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", HUB), timeout=5).close()
    except Exception as error:  # a proxy may answer anything
        return isinstance(error, urllib.error.HTTPError)  # a refusal is an answer
    return True

def load_pretrained(kind, path, field="model", **settings):
    """kind.from_pretrained of a folder or hub name. Raises InputError, which names the setting `field`."""
    if "stage" in (read_json(Path(path, "config.json")) or {}):
        raise InputError(f"{field} {path!r} is the folder of a run; its model is {path}/final")
    local = Path(path).exists() or not hub_is_reachable()  # without network, from the hub's cache
    try:
        return kind.from_pretrained(path, local_files_only=local, **settings)
    except Exception as error:  # a damaged file can raise anything: each format has errors of its own
        reason = str(error).split("\n")[0][:200]
        raise InputError(f"{field} {path!r} cannot be loaded ({reason}); give a folder or a name") from error

def load_tokenizer(path, field="model"):
    """Load the tokenizer of a checkpoint. Raises InputError if there is none, or it has no end token."""
    tokenizer = load_pretrained(AutoTokenizer, path, field)
    if not tokenizer("1")["input_ids"]:  # transformers makes an empty one where the files are missing
        raise InputError(f"{field} {path!r} has no tokenizer; put the files of its base model's beside it")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{field} {path!r} has a tokenizer without end token; set its eos_token")
    return tokenizer

def prepare_model(model, name="given"):
    """Switch a model to `grouped_attention`. Raises InputError if it would then compute something else.
    Here logits are hidden states times the output layer: not scaled, not capped, as elsewhere; no windows."""
    kind, window = model.config.model_type, getattr(model.config, "sliding_window", None)
    if kind not in ("qwen2", "qwen3", "llama") or window:
        kind += " with a sliding window" if window else ""
        raise InputError(f"model {name!r} is a {kind}; this file computes only Qwen2, Qwen3 and Llama right")
    model.set_attn_implementation("grouped")
    torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper it would build a plan for every new shape

def load_model(path, device, dtype):
    """Load a Qwen2, Qwen3 or Llama checkpoint. Raises InputError for any other, and for a damaged one."""
    model, loading = load_pretrained(AutoModelForCausalLM, path, dtype=dtype, output_loading_info=True)
    if loading["missing_keys"]:  # transformers would put random weights in their place
        raise InputError(f"model {path!r} lacks weights, as {min(loading['missing_keys'])}; save it again")
    prepare_model(model, path)
    if model.num_parameters() < 10_000_000:
        torch.set_num_threads(1)  # on a busy machine two took 4 to 20 times as long: they wait for each other
    return model.to(device)

def memory_gb(model, cfg, longest_prompt):
    """Estimate what a GPU holds beside the weights -> GB of training, GB of each completion being sampled.
    Beside a bfloat16 weight of 2 bytes lie 18 more while it is trained: a gradient (2), the sum of gradients
    (4), the master (4), two moments (8). Beside a float32 weight lie 12. A reference is one more copy."""
    shape, size, layers = model.config, model.dtype.itemsize, model.config.num_hidden_layers
    length = math.ceil((longest_prompt + cfg.max_completion_tokens) / 256) * 256
    keys_and_values = 2 * layers * model.base_model.layers[0].self_attn.k_proj.out_features * length
    row = size * keys_and_values + 48 * shape.vocab_size  # with its probabilities, in float32, several times
    if cfg.stage in ("eval", "sample"):
        return 0.0, row / 1e9
    copies = (12 if size == 4 else 18) + (size if cfg.stage == "zero" and cfg.kl_coef else 0)
    in_layer = 16 * shape.hidden_size + 3 * shape.intermediate_size  # numbers a token needs within one layer
    kept = layers * (shape.hidden_size if cfg.gradient_checkpointing else in_layer)
    activations = size * cfg.micro_batch_tokens * (kept + in_layer)
    return (model.num_parameters() * copies + activations + 16 * CHUNK) / 1e9, row / 1e9

def fit_into_memory(cfg, model, longest_prompt):
    """Set max_rows, on a GPU, to what training leaves memory for. Raises InputError below one group."""
    if model.device.type != "cuda":
        return cfg
    gc.collect()
    torch.cuda.empty_cache()  # of an earlier stage of this process
    free = 0.95e-9 * torch.cuda.mem_get_info(model.device)[0]
    training, row = memory_gb(model, cfg, longest_prompt)
    rows = int((free - training) / row)
    show(f"memory    {free:.1f} GB beside the weights: {training:.1f} for training, {rows:,} completions")
    if rows < max(cfg.group_size, cfg.eval_samples, cfg.rejection_samples):
        raise InputError(f"memory is too small for one group; lower max_completion_tokens "
                         f"({cfg.max_completion_tokens}), micro_batch_tokens ({cfg.micro_batch_tokens}) or "
                         f"group_size ({cfg.group_size}), set kl_coef 0, or take a smaller model")
    return dataclasses.replace(cfg, max_rows=min(rows, cfg.max_rows or rows))

# ---- The grader --------------------------------------------------------------------------------------------
# A closed grammar reads model text, and every number is capped before it can grow. `tokenize` brings answers
# to one spelling, AnswerParser builds its value (an unevaluated sympy expression, or a tuple for a list),
# `same` compares two values part by part, and `agree` two expressions by their numbers at six random points.
# Conventions: 0.333 is not 1/3. A unit, money or a name ("x =") may be missing on one side, but not differ.
# Tuples and intervals are ordered, sets and lists are not. What cannot be read equals only its own text.

def last_boxes(text):
    """The contents of the outermost balanced \\boxed{...} of a text, in order, found in one pass."""
    boxes, depth, start = [], 0, 0
    for match in re.finditer(r"\\[{}\\]|(\\(?:boxed|fbox)\s*(?={))?([{}])", text):
        if match[2] and (depth or match[1]):                 # a brace, not \\{, that opens a box or is in one
            start = start if depth else match.end()
            depth += 1 if match[2] == "{" else -1
            if not depth:
                boxes.append(text[start:match.start()].strip())
    return boxes

def extract_answer(completion: str, lenient: bool = False) -> str | None:
    """The only <answer> after the thinking, or else its boxes; lenient: any last tag, box or number."""
    final = completion.rpartition("</think>")[2]
    before, opened, rest = final.rpartition("<answer>")
    content, ended, after = rest.partition("</answer>")
    if opened and ended and (lenient or not re.search("answer>|<think>", before + after)):
        return ", ".join(dict.fromkeys(last_boxes(content))) or content.strip() or None
    if not lenient:                               # nothing counts while it thinks, or if tags do not match
        unclear = re.search("answer>|<think>", final)
        return None if unclear else ", ".join(dict.fromkeys(last_boxes(final))) or None    # several: a list
    numbers = re.findall(r"(?<![-(])[-(]*\d(?:[\d\s.+\-*/×÷()]|,(?=\d))*", completion)
    found = last_boxes(completion) or numbers or [""]
    return found[-1].rstrip(" .\n+-*/×÷(") or None

def require(condition, reason):
    """Raise ValueError unless the condition holds: the text is no answer that can be read."""
    if not condition:
        raise ValueError(reason)

def build(head, *args):
    """A sympy expression as it is written: simplifying a hostile one can take sympy for ever."""
    if not isinstance(head, type):
        return head(*args)
    require(all(isinstance(arg, (sympy.Expr, int)) for arg in args), "structures cannot be calculated with")
    return head(*args, evaluate=False)

MP = sympy.core.evalf.mp.clone()          # sympy's numerical half, with a precision nobody else can change
MP.prec, MAX_BITS, MAX_CHARACTERS, TOLERANCE = 1200, 1000, 300, MP.mpf(2) ** -1050
# Each operator: how tightly it binds, and what it builds.
OPERATORS = {"=": (1, lambda *ab: ("=", *ab)), "+": (2, sympy.Add), "-": (2, sympy.Add), "*": (3, sympy.Mul),
             "/": (3, lambda a, b: build(sympy.Mul, a, build(sympy.Pow, b, -1))), "^": (5, sympy.Pow)}
COMMANDS = {r"\frac": OPERATORS["/"][1], r"\root": lambda n, x: build(sympy.Pow, x, build(sympy.Pow, n, -1))}
NAMED = "sin cos tan cot sec csc asin acos atan sinh cosh tanh exp ln".split()
FUNCTIONS = {"\\" + f: getattr(sympy, f) for f in NAMED} | {r"\log": lambda x: build(sympy.log, x, 10)}
CONSTANTS = {r"\pi": sympy.pi, "e": sympy.E, "i": sympy.I, r"\infty": sympy.oo}
NUMBERS = {sympy.pi: +MP.pi, sympy.E: +MP.e, sympy.I: MP.mpc(0, 1), sympy.oo: MP.inf}
NUMERIC = {sympy.Add: operator.add, sympy.Mul: operator.mul, sympy.Pow: operator.pow}
SYMBOLS = COMMANDS.keys() | {"\\" + name for name in [*sympy.core.alphabets.greeks, "emptyset", "infty"]}
STARTERS = FUNCTIONS.keys() | SYMBOLS | {"(", "[", "{"}                     # 2x, 3(x+1), x\sqrt2, but not 2 3
ALIASES = {alias: token for token, aliases in {       # other spellings; a quote in front of it marks a word
    "*": r"\cdot \times × ·", "/": r"\div ÷", "-": "− –", "^": "**", "≤": r"\le \leq <=", "≥": r"\ge \geq >=",
    "=": r"\in ∈", r"\{": r"\lbrace", r"\}": r"\rbrace", "(": r"\langle", ")": r"\rangle", r"\pm": "±",
    r"\pi": "π", r"\infty": r"∞ \inf", r"\emptyset": r"\varnothing ∅", ",": r""" "or "and ; \cup ∪""",
}.items() for alias in aliases.split()}
# A word after a value is its unit: of four letters or more, or one of these, but none of NOT_UNITS.
UNITS = "cm|mm|km|in|ft|yd|mi|kg|mg|lbs?|oz|sec|min|hrs?|mph|days?|ml|sq|st|nd|rd|th|cups?|per|of|and|or"
NOT_UNITS = (r"not|wrong|plus|minus|negative|squared|cubed|factorial|half|halves|thirds?|quarters?|fifths?|"
             r"tenths?|hundredths?|dozen|hundred|thousand|\w*illion\w*")
# What one token cannot show: \frac12 becomes \frac{1}{2}, 3 1/2 (3+1/2), 5\text{ cm} 5 "cm, 50\% 50 "percent.
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (    # in this order
    (r"^\s*(?i:the (?:final )?answer is:?)|^[\s*]+|[\s.,;*]+$", ""), (r"\\arc", r"\\a"),
    (r"(?<![\d,.(\[])(?<!\\\{)\d{1,3}(?:(?:\{,\}|,?\\[,!]\s?|,)\d{3})+(?!\d|,\d)",
     lambda m: re.sub(r"\D", "", m[0])),                                        # 1,234, but (1,234) is a pair
    (r"\\(?:text|mathrm|operatorname|mbox|textbf|textit|textrm|textnormal)\s*\{([^{}]*)\}",
     lambda m: re.sub(r"(?<![\\\w])([A-Za-z]{2,}|[mgshL])(?!\w)\.?", r'"\1', f" {m[1]} ")),
    (r"\\begin\{(?:[pb]?matrix|array)\}(?:\{[clr|]*\})?", "⟨⟨"), (r"(?:\\\\\s*)?\\end\{\w*\}", "⟩⟩"),
    (r"\\\\", "⟩,⟨"), ("&", ","), (r"(?:\^\s*\{?\s*\\circ\s*\}?|°)\s*(?:[CF]\b)?", ' "degree '),
    (r"(?:\\\$|^\s*\$(?=[^$]*$))\s*(-?[\d.]+)", r'\1 "dollar '), (r"(√|(?<!\\)sqrt)\s*(\d+)", r"\\sqrt{\2}"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|boxed|fbox|math(?:bf|it|cal)|boldsymbol|vec|hat|"
     r"rm|bf|allowbreak|q?quad|angle|triangle)(?![A-Za-z])|\\[()\[\],;:!\s]|~|\\?\$", " "),    # says nothing
    (r'(?<![\\A-Za-z])"?(sin|cos|tan|sqrt|log|ln|pi|infty|inf)(?![a-z])', r"\\\1"),        # now the words
    (rf'(?<![\\A-Za-z"])([A-Za-z]{{4,}}|{UNITS})(?![A-Za-z])\.?', r'"\1'), (r',\s*(?="and)', ""),
    (rf'"((?i:{NOT_UNITS}))\b', r"\\\1"), (r'^\s*("\w+\s*)+=', ""), (r'/\s*(?=")', ' "per'),
    (r'("[a-z]+)\s*\^\s*\{?([23])\}?', r"\1^\2"), (r"\((\d+)\)_", r"\1_"), (r"_\{\s*(\w)\s*\}", r"_\1"),
    (r'(\\(?:sin|cos|tan)[\s({]*[\d.]+)\s*"degree', r"\1\\frac{\\pi}{180}"), (r"\\?%", ' "percent '),
    (r"\\sqrt\s*\[(.*?)\]", r"\\root{\1}"), (r"\\sqrt", r"\\root{2}"), (r"\\[dtc]frac", r"\\frac"),
    *[(r"(\\(?:frac|root)(?:\s*\{[^{}]*\})?)\s*(\d)", r"\1{\2}")] * 2,          # \frac12, \sqrt2
    (r"(?<![\d.^_])(\d+)\s*(\\frac\s*\{\d+\}\s*\{\d+\}|\s\d+\s*/\s*\d+)", r"(\1+\2)"))]       # 3 1/2 is 3.5
# A token is x_1 or 52_8 (in base 8: a name of its own), a number, a word, a command, a name or a character.
TOKEN = re.compile(r"""(?:\\?[A-Za-z]+|\d+)_(?:\{\w+\}|\w)|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d\d?(?!\d))?|"""
                   r""""[A-Za-z]+(?:\^[23])?|\\[A-Za-z]+|\\.|[A-Z][A-Za-z]+|\*\*|<=|>=|\S""")

def tokenize(text):
    """The tokens of an answer: numbers, operators, \\commands, names, and words with a quote in front."""
    text = re.sub(r"\s", " ", text)
    require(len(text) <= MAX_CHARACTERS and text.isprintable(), "not an answer")
    require(not re.search(r"([-+({[]\s*){20}|([,;&][^,;&]*){50}", text), "too deep or too many items")
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return tuple(ALIASES.get(token.lower(), token) for token in TOKEN.findall(text))

class AnswerParser:
    """A recursive descent from tokens to a value: a sympy expression, or a tuple of a kind and its parts."""
    def __init__(self, tokens):
        self.tokens, self.units = [*tokens, ""], []

    def bracket(self, opening):
        """Separated values up to the closing bracket. Their kind is the pair of brackets, or "," without."""
        values = [self.expression()]
        while self.tokens[0] == ",":
            self.tokens.pop(0)
            values.append(self.expression())
        pair = opening[-1] + self.tokens.pop(0)[-1:]
        require(pair in ("()", "(]", "[)", "[]", "{}", "⟨⟩"), "unbalanced brackets")
        return values[0] if len(values) == 1 and pair != "⟨⟩" else ("," if opening == "{" else pair, *values)

    def expression(self, level=0):
        """Precedence climbing: an operand, its unit, what binds tighter than `level` (3: as in sin 2x)."""
        value = self.atom()
        while self.tokens[0][:1] == '"':
            self.units.append(self.tokens.pop(0).lower().rstrip("es"))
        while True:
            token = self.tokens[0]
            juxtaposed = token[:1].isalpha() or token in (SYMBOLS if level == 3 else STARTERS)
            rank, head = OPERATORS.get(token, (4 * juxtaposed, sympy.Mul))
            if rank <= level:
                return value
            if token in OPERATORS and token != "-":          # a minus stays: it is the sign of the operand
                self.tokens.pop(0)
            value = build(head, value, self.expression(rank if rank < 3 else 4))        # 1/2x is (1/2)x

    def atom(self):
        """A sign and its operand, something in brackets, a command with what it takes, a number or a name."""
        token = self.tokens.pop(0)
        if token in ("+", "-"):
            return build(sympy.Mul, int(token + "1"), self.expression(4))
        if token in ("(", "[", "{", r"\{", "⟨"):
            return self.bracket(token)
        if token in COMMANDS:
            return build(COMMANDS[token], self.atom(), self.atom())
        if token in FUNCTIONS:
            argument = self.atom() if self.tokens[0] in ("(", "{", "[") else self.expression(3)
            return build(FUNCTIONS[token], argument)
        if re.match(r"\.?\d", token) and "_" not in token:
            return sympy.Rational(token)
        require(token[:1].isalpha() or token[:1].isdecimal() or token.split("_")[0] in SYMBOLS, "no symbol")
        return CONSTANTS.get(token) or sympy.Symbol(token)

def read(tokens):
    """The value of an answer, with \\pm in it a list of two readings; and its unit, all its words as one."""
    readings = []
    for sign in "+-" if r"\pm" in tokens else "+":
        parser = AnswerParser(["{", *(sign if token == r"\pm" else token for token in tokens), "}"])
        value = parser.atom()
        require(not parser.tokens[0], "text behind the answer")
        readings += value[1:] if isinstance(value, tuple) and value[0] in ",{}" else [value]
    return (",", *readings) if r"\pm" in tokens else value, "".join(sorted(parser.units))

def is_name(value):
    """Whether it may stand before "=" without being part of the answer: x, AB, a + b, (x, y); not 2x, x^2."""
    if isinstance(value, tuple):
        return value[0] != "=" and all(map(is_name, value[1:]))
    return bool(value.free_symbols) and not value.atoms(sympy.Number)

@functools.lru_cache(maxsize=2 ** 14)                        # a list's values are compared with one another
def number_at(expr, point):
    """The value at one of six random points, in 1200 bits. Each part is capped, so that nothing can grow."""
    if expr.is_Rational:
        return MP.mpf(expr.p) / expr.q
    if expr.is_Symbol:                                       # first a positive point, then a negative one
        return MP.mpf(random.Random(f"{point} {expr}").uniform(-2 * (point > 0), 2 * (point != 1)))
    args = [number_at(arg, point) for arg in expr.args]
    operation = NUMERIC.get(expr.func) or getattr(MP, expr.func.__name__, None)          # sympy.sin: MP.sin
    number = operation(*args) if args else NUMBERS[expr]
    sizes = [MP.mag(part) for part in (number.real, number.imag) if part and not MP.isinf(part)] or [0]
    require(abs(max(sizes)) <= MAX_BITS and min(sizes) >= -3 * MAX_BITS, "too large or too small")
    return number

def agree(a, b, up_to_factor=False):
    """Whether a = b, or a = c b for some constant c, at six random points."""
    pairs = [(number_at(a, n), number_at(b, n)) for n in range(6 if a.free_symbols | b.free_symbols else 1)]
    if up_to_factor:
        p, q = pairs[0]
        pairs = [(x * q, y * p) for x, y in pairs] if p and q and a.free_symbols else [(0, 1)]
    return all(x == y or abs(x - y) <= TOLERANCE * max(1, abs(x), abs(y)) < MP.inf for x, y in pairs)

def same(a, b):
    """Whether two values are equal: structure here, algebra in `agree`."""
    kind, other = (value[0] if isinstance(value, tuple) else "" for value in (a, b))
    if not kind and not other:
        return a == b or agree(a, b)
    if "=" in (kind, other) and kind != other:               # x = 5 is 5
        (_, name, value), plain = (a, b) if kind == "=" else (b, a)
        return is_name(name) and same(value, plain)
    if kind == "=" and not (is_name(a[1]) and same(a[1], b[1])):
        left, right = (build(sympy.Add, x, build(sympy.Mul, -1, y)) for _, x, y in (a, b))
        return agree(left, right, up_to_factor=True)
    if {kind, other} <= {",", "{}"}:                         # unordered: every value has an equal
        matches = [[same(x, y) for y in b[1:]] for x in a[1:]]
        return all(map(any, matches)) and all(map(any, zip(*matches)))
    return {kind, other} in ({kind}, {",", "()"}) and len(a) == len(b) and all(map(same, a[1:], b[1:]))

@functools.lru_cache(maxsize=2 ** 16)                        # a group repeats its answers
def compare(predicted, answer):
    """The outcome of reading both and comparing them: "right", "wrong", "unparsable" or "error"."""
    try:
        left, right = tokenize(predicted), tokenize(answer)
        word, other = ("".join(tokens).replace('"', "").casefold() for tokens in (left, right))
        if left == right != () or word == other and re.fullmatch(r"\(?[a-z]{2,}\d*\)?|\([a-z]\)", word):
            return "right"
        (value, unit), (reference, wanted) = read(left), read(right)
        return "right" if (unit == wanted or "" in (unit, wanted)) and same(value, reference) else "wrong"
    except (ValueError, ArithmeticError, RecursionError):
        return "unparsable"
    except Exception:                 # the one fence, for mistakes here or in sympy: counted, never hidden
        return "error"

def answers_equal(predicted: str, answer: str) -> bool:
    """Whether two answers in plain text or LaTeX mean the same; never raises, and caps bound its time."""
    texts = isinstance(predicted, str) and isinstance(answer, str)
    return texts and compare(predicted[:MAX_CHARACTERS + 1], answer[:MAX_CHARACTERS + 1]) == "right"

# ---- Countdown and programs --------------------------------------------------------------------------------
def countdown_equal(expression, numbers, target):
    """Whether + - * / and brackets make the target of the numbers, each used once; "= value" may follow."""
    formula, _, stated = expression.translate(str.maketrans("x×÷−", "**/-")).partition("=")
    number = r"[\s(]*(0|[1-9][0-9]*)[\s)]*"
    if not re.fullmatch(rf"{number}([-+*/]{number})*", formula):         # numbers and operators take turns
        return False
    right = all(answers_equal(formula, str(value)) for value in (target, stated or target))
    return right and sorted(map(int, re.findall(r"\d+", formula))) == sorted(numbers)

def extract_program(completion):
    """The last fenced block after the thinking, without its language line."""
    parts = completion.rpartition("</think>")[2].split("```")
    return parts[-2].partition("\n")[2] if len(parts) >= 3 and len(parts) % 2 else None

# This runs in the child. The tests and a password are read only when the program has ended, from a
# descriptor it was not told about, and the password is printed after the last test: nothing else counts.
TEST_RUNNER = """
import contextlib, json, os, runpy
with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):     # not every system has these
    import resource
    for name, value in dict(CPU=30, FSIZE=1 << 24, CORE=0, NPROC=1024, AS=1 << 29).items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
channel = os.fdopen(os.dup(0), "rb")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
names = runpy.run_path("program.py", run_name="program")
password, *tests = json.loads(channel.read())
for test in tests:
    exec(test, names)
print("", password, flush=True)
os._exit(0)
"""

def run_tests(program, tests, time_limit_seconds=5.0):
    """Run a program, then its tests, which are assert lines -> "right", "wrong", "timeout" or "error".
    The child has a process group, which is killed at the end, a folder, no environment, 512 MB, 30 seconds of
    CPU. This contains accidents and is no security boundary: for hostile code use a container."""
    password = secrets.token_hex(16)
    try:
        with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
              tempfile.TemporaryFile() as output):
            Path(folder, "program.py").write_text(program, encoding="utf-8")
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", TEST_RUNNER], cwd=folder, start_new_session=True,
                env={"SYSTEMROOT": os.environ.get("SYSTEMROOT", "")},  # Windows cannot do without
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL)
            try:
                process.communicate(json.dumps([password, *tests]).encode(), timeout=time_limit_seconds)
            finally:
                with contextlib.suppress(AttributeError, OSError):  # Windows has no process groups
                    os.killpg(process.pid, signal.SIGKILL)  # and all that it started
                process.kill()
                process.wait()
            output.seek(0)
            passed = output.read(1 << 20).split()[-1:] == [password.encode()]
    except subprocess.TimeoutExpired:
        return "timeout"
    except (OSError, UnicodeError):
        return "error"
    return ("right" if passed else "wrong") if tests else "error"

# ---- Runs --------------------------------------------------------------------------------------------------
MAY_CHANGE = ("steps", "save_every", "sample_every", "resume", "output_dir")  # when a run is resumed
MINUTES = dict(zero=3, r1=7, distill=13)  # for the embedded models on one thread of a laptop
show = tqdm.write  # it prints a line without breaking a progress bar

def read_json(path):
    """Read an object from a JSON file; None if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(Path(path).read_text(encoding="utf-8"))

def write_text(path, text):
    """Write a text file, whole or not at all."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # half an emoji has no UTF-8
    os.replace(temporary, path)

def digests(folder):
    """SHA-256 of each file of a checkpoint, by name; files.json, which keeps them, is left out."""
    found = {}
    for path in folder.iterdir():
        if path.is_file() and path.name != "files.json":
            with open(path, "rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found

def save_model(model, tokenizer, folder, state=None):
    """Write a checkpoint (with `state`, to resume from) whole or not at all; RunError if the disk is full."""
    temporary = folder.with_name(f"writing-{os.getpid()}-{folder.name}")
    try:
        if model.can_generate():
            model.generation_config.eos_token_id = sorted(stop_token_ids(model, tokenizer))
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if state:
            torch.save(state, temporary / "state.pt")
            write_text(temporary / "files.json", json.dumps(digests(temporary)))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except Exception as error:  # OSError, and what safetensors and torch make of a full disk
        reason = str(error).split("\n")[0]
        raise RunError(f"{folder} could not be written ({reason}); free some space, then --resume") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

def claim_folder(cfg):
    """Make the folder of a new run: output_dir, or the first of runs/STAGE, runs/STAGE-2, … to be free."""
    for n in itertools.count(1):
        folder = Path(cfg.output_dir or f"runs/{cfg.stage}-{n}".removesuffix("-1"))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # perhaps another run has just made it
            if cfg.output_dir:
                raise InputError(f"output_dir {folder} is there already; --resume goes on with it") from None

def verifies(problem):
    """Tell whether a rule can judge a problem: by its tests, or by a reference that equals itself."""
    same = problem.task not in GENERAL and answers_equal(problem.answer, problem.answer)
    return same or problem.task == "code"

def load_data(cfg):
    """Load what a stage trains on, and what it evaluates on; no problem is in both."""
    needed = dict(sft="completion", reward="rejected").get(cfg.stage, "answer")
    fits = verifies if needed == "answer" else operator.attrgetter(needed)
    judged = fits if cfg.stage == "reward" else verifies  # sft is evaluated by rules, as GRPO is
    whole = cfg.eval_data or cfg.stage == "eval"
    rows = load_problems(cfg.eval_data or cfg.data, True, whole, "eval_data" if cfg.eval_data else "data")
    held_out = list(itertools.islice(filter(judged, rows), cfg.eval_problems))
    taken = {problem.key for problem in held_out}
    rows = [] if cfg.stage == "eval" else load_problems(cfg.data, False, whole)
    problems = [problem for problem in rows if fits(problem) and problem.key not in taken]
    show(f"data      {cfg.data}: {len(problems):,} problems to train on, {len(held_out):,} to evaluate on; "
         f"{len(rows) - len(problems):,} rows left out (without a usable {needed}, or in eval_data too)")
    if not held_out or not problems and cfg.stage != "eval":
        raise InputError(f"data {cfg.data!r}: stage {cfg.stage} needs more rows with a usable {needed}")
    return problems, held_out

def load_general(cfg, evaluation):
    """Load general questions, each once, with the good reply if there is a preference pair."""
    rows = load_problems(cfg.general_data, evaluation, field="general_data") if cfg.general_data else []
    if any(row.task not in GENERAL for row in rows):
        raise InputError(f"general_data {cfg.general_data!r}: every task must be helpful or harmless")
    return [*{row.question: row for row in sorted(rows, key=lambda row: bool(row.rejected))}.values()]

class Run:
    """A stage at work: its settings, data and models, and the folder that it writes.
    The folder holds config.json, metrics.jsonl (a line a step), evaluations.jsonl, samples.jsonl,
    summary.json, checkpoint/ (to resume from), best/ and final/ (ordinary transformers checkpoints)."""
    def __init__(self, cfg):
        """Take the folder. Raises InputError if another process has it."""
        self.cfg, self.facts, self.logs, self.said, self.began = cfg, {}, {}, [], time.perf_counter()
        self.state = self.policy = None
        self.folder = Path(cfg.output_dir) if cfg.resume else claim_folder(cfg)
        self.lock = open(self.folder / "lock", "w", encoding="utf-8")
        try:
            if fcntl:  # Windows has none; the system lets go when the process ends, however
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{self.folder} is in use by another process; wait for its end") from None

    def prepare(self):
        """Load what the stage needs, cheap checks first -> settings, with max_rows that fit into memory."""
        cfg = self.cfg
        device, dtype = pick_device(cfg)
        self.problems, self.held_out = load_data(cfg)
        self.general, self.questions = load_general(cfg, False), load_general(cfg, True)[: cfg.eval_problems]
        path = self.load_checkpoint() if cfg.resume else None
        if not path and cfg.model in EMBEDDED:
            path = build_base_model(f"runs/{cfg.model.replace('tiny', 'base')}-seed{cfg.seed}", cfg.seed,
                                    width=EMBEDDED[cfg.model])
        path = str(path or cfg.model)
        self.tokenizer = load_tokenizer(path)
        if cfg.stage == "reward":
            self.judge = RewardModel(path, cfg, device, untrained=True)
        else:
            self.policy = load_model(path, device, dtype)
            self.judge = RewardModel(cfg.reward_model, cfg, device) if cfg.reward_model else None
        self.learner = learner = self.policy or self.judge.model
        kind, weights = learner.config.model_type, learner.num_parameters()
        show(f"model     {path}: {kind}, {weights:,} weights, {learner.dtype} on {device}")
        show(f"disk      a checkpoint takes about {16e-9 * weights:.2g} GB, and for a moment there are two")
        return fit_into_memory(cfg, learner, self.check_prompts())

    def check_prompts(self):
        """Show a prompt as the model sees it, and refuse what is too long -> tokens of the longest prompt."""
        rows = (*self.held_out, *self.problems, *self.general, *self.questions)
        encoded = [encode_prompt(self.tokenizer, render_prompt(self.tokenizer, row.question, self.cfg))
                   for row in rows]
        longest, limit = max(map(len, encoded)), self.cfg.max_completion_tokens
        positions = getattr(self.learner.config, "max_position_embeddings", math.inf)
        if longest + limit > positions:
            raise InputError(f"max_completion_tokens is {limit}; with the {longest} of the longest prompt "
                             f"it passes the {positions} positions of the model")
        stops = self.tokenizer.convert_ids_to_tokens(sorted(stop_token_ids(self.learner, self.tokenizer)))
        show(f"prompt    {self.tokenizer.decode(encoded[0])!r}; stop tokens {stops}")
        return longest

    def log(self, name, *rows):
        """Add rows to a log and write it whole -> its rows; a number that is not finite becomes None."""
        log = self.logs.setdefault(name, [])
        for row in rows:
            log.append({key: None if isinstance(value, float) and not math.isfinite(value) else value
                        for key, value in row.items()})
        write_text(self.folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in log))
        return log

    def log_step(self, m, rollout, batch):
        """Show and log a step: its numbers, what looks wrong in them, and now and then a completion."""
        history = self.log("metrics.jsonl", m)
        if len(history) % 20 == 1:
            show(TITLES if len(history) > 1 else f"{LEGEND}\n{TITLES}")
        show(STEP.format(**m))
        for sentence in doctor(history):
            if sentence not in self.said:  # each once
                self.said.append(sentence)
                show(f"     doctor: {sentence}")
        if self.cfg.sample_every and (m["step"] - 1) % self.cfg.sample_every == 0:
            row = m["step"] % len(rollout.texts)
            problem, text = batch[row // self.cfg.group_size], rollout.texts[row]
            outcome = grade(text, problem)[1]
            self.log("samples.jsonl", dict(step=m["step"], question=problem.question, answer=problem.answer,
                                           completion=text, outcome=outcome))
            show(f"     {problem.question} -> {text}  [{outcome}]")

    def evaluate(self, step, samples=None):
        """Evaluate on held-out problems, on screen and on disk; the best model on the way goes to best/."""
        result = evaluate(self.policy, self.tokenizer, self.held_out, self.cfg, samples)
        if self.questions:
            result |= evaluate_general(self.policy, self.tokenizer, self.questions, self.cfg, self.judge)
        self.log("evaluations.jsonl", {"step": step, **result})
        show(f"held-out  step {step}: {result['pass_at_1']:.1%} right, {result['maj_at_k']:.1%} by majority")
        best = self.facts.get("best")
        if self.cfg.stage == "zero" and (not best or result["pass_at_1"] > best["pass_at_1"]):
            self.facts["best"] = dict(step=step, pass_at_1=result["pass_at_1"])
            if step:
                self.save_model("best")
        return result

    def save_model(self, name):
        """Save what the stage trains as an ordinary checkpoint."""
        save_model(self.learner, self.tokenizer, self.folder / name)

    def save_checkpoint(self, state):
        """Save a checkpoint to resume from, with the logs so far; at most two exist, while one is written."""
        folder = self.folder / "checkpoint" / f"step-{state['step']:06d}"
        for old in sorted(folder.parent.glob("step-*"))[:-1]:
            shutil.rmtree(old)
        save_model(self.policy, self.tokenizer, folder, {**state, "facts": self.facts, "logs": self.logs})

    def load_checkpoint(self):
        """Take up the newest whole checkpoint -> its folder; what was logged after it is done again."""
        for path in self.folder.rglob("writing-*"):  # what a killed process left half-written
            shutil.rmtree(path)
        for folder in sorted((self.folder / "checkpoint").glob("step-*"), reverse=True):
            if read_json(folder / "files.json") == digests(folder):
                self.state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
                self.facts, self.logs = self.state["facts"], self.state["logs"]
                for name in self.logs:
                    self.log(name)
                return folder
            show(f"warning   checkpoint {folder} is damaged and is not used")
        show("warning   there is no whole checkpoint to go on from, so the run starts again")

    def begin_recipe(self):
        """Look at the data of all stages before it takes long; fix the problems that all evaluate on."""
        cfg = self.cfg
        load_general(cfg, True)
        if cfg.cold_start:
            rows = load_problems(cfg.cold_start, whole=True, field="cold_start")
            if not any(row.completion for row in rows):
                raise InputError(f"cold_start {cfg.cold_start!r} has no row with a completion")
        _, problems = load_data(dataclasses.replace(cfg, stage="zero"))
        path = write_problems(self.folder / "held-out.jsonl", problems)
        self.shared = dict(general_data=None, reward_model=None, preference_steps=0, eval_data=path)
        return cfg

    def stage(self, name, stage, **changes):
        """Carry out a stage of a recipe in its own folder, unless it is finished -> the model it leaves."""
        folder = self.folder / name
        begun = (folder / "config.json").exists()
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)  # made just before a kill
        show(f"\n== {name}")
        carry_out(Run(dataclasses.replace(self.cfg, stage=stage, output_dir=str(folder), resume=begun,
                                          **{**self.shared, **changes})))
        facts = read_json(folder / "summary.json")
        evaluation = facts.get("after", facts.get("before", {}))
        self.facts.setdefault("results", {})[name] = {**evaluation, "seconds": facts["seconds"]}
        return str(folder / "final")

    def finish(self):
        """Write summary.json, which tells that the stage is finished, and show what came out."""
        facts, seconds = self.facts, time.perf_counter() - self.began
        summary = json.dumps(dict(steps=self.cfg.steps, seconds=seconds, **facts), indent=2)
        write_text(self.folder / "summary.json", summary + "\n")
        both = {name: facts[name] for name in ("before", "after") if name in facts}
        table = facts.get("results", both)  # of evaluations, one a row
        columns = [name for name in TABLE if any(name in row for row in table.values())]
        for label, row in {"": TABLE, **table}.items() if table else ():
            show(f"{label:16}" + "".join(f"{str(row.get(name, '-'))[:7]:>8}" for name in columns))
        for name in ("accuracy", "mean_tokens", "reflection", "entropy"):
            values = [row[name] for row in self.logs.get("metrics.jsonl", []) if row[name] is not None]
            if values:
                show(f"{name:12} {sparkline(values)} {values[0]:.3g} -> {values[-1]:.3g}")
        if "after" in facts:
            show(f"right on held-out problems: {facts['before']['pass_at_1']:.0%} before, "
                 f"{facts['after']['pass_at_1']:.0%} after")
        show(f"wrote {self.folder}/ in {seconds:.0f} seconds")

TABLE = dict(pass_at_1="pass@1", interval="+-", maj_at_k="maj@k", format_rate="format", language="lang",
             mean_tokens="tokens", reflection_rate="again", judge="judge", helpful="helpful",
             harmless="no harm", seconds="seconds")  # the essentials of an evaluation, and their titles

@contextlib.contextmanager
def finishing_steps():
    """Note the first Ctrl-C or SIGTERM, and raise it when the block is left; a second one ends at once."""
    noted = []
    def note(signum, _):
        """Handle a signal."""
        if noted:
            raise KeyboardInterrupt(signum)
        noted.append(signum)
        show("finishing this step, then saving; once more to end at once")

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if noted:
        raise KeyboardInterrupt(noted[0])

LEGEND = """Each line is a step. reward: its mean; right, format: shares; tokens: mean length; cut: share
without end; again: share with a word like wait; flat: groups with all rewards equal, which teach nothing;
kl: distance from the reference, nats a token; clip: tokens whose gradient is cut; entropy: nats; s: time"""
TITLES = " step reward  right format tokens  cut again flat     kl  clip entropy     s"
STEP = ("{step:5} {reward:6.2f} {accuracy:6.1%} {format:6.1%} {mean_tokens:6.1f} {truncated:4.0%} "
        "{reflection:5.0%} {flat_groups:4.0%} {kl:6.4f} {clipped:5.1%} {entropy:7.2f} "
        "{step_seconds:5.1f}")

def doctor(history):
    """Say in words what looks wrong in the metrics of a run so far, in its last step above all."""
    m, first = history[-1], history[0]["entropy"] or 0
    fives = [mean(row["accuracy"] for row in history[i : i + 5]) for i in range(0, len(history), 5)]
    if m["grad_norm"] is None:
        return ["the gradient is not finite: such an update is left out"]
    weak, unread = m["accuracy"] < 0.9, m["outcomes"].get("unparsable", 0)
    lately = mean(row["accuracy"] for row in history[-5:])
    findings = {
        "most completions are cut off: raise max_completion_tokens": m["truncated"] > 0.5,
        "most groups are flat: take easier problems or a larger group_size": m["flat_groups"] > 0.8 and weak,
        "the policy moves far in a step: lower learning_rate": m["clipped"] > 0.3,
        "entropy explodes: learning_rate is probably too high": m["entropy"] > 2 * first + 0.5,
        "entropy has collapsed: learning_rate is probably too high": m["entropy"] < 0.02 and weak,
        "accuracy has fallen far from its best: lower learning_rate": lately < max(fives) - 0.2,
        "sampling and training disagree on log-probabilities before any update": m["sampler_gap"] > 0.05,
        "many answers could not be read as answers": unread > 0.2 * sum(m["outcomes"].values())}
    return [sentence for sentence, holds in findings.items() if holds]

def sparkline(values):
    """A curve as one line of at most 50 characters; of more values, every second or third … is drawn."""
    drawn = values[:: math.ceil(len(values) / 50)]
    low, high = min(drawn), max(drawn)
    return "".join("▁▂▃▄▅▆▇█"[int(7.99 * (value - low) / (high - low or 1))] for value in drawn)

# ---- Stages that do one thing ------------------------------------------------------------------------------
def sft(run):
    """Supervised training on the completions in --data: first examples, filtered samples or a teacher's."""
    cfg = run.prepare()
    run.facts["before"] = run.evaluate(0)
    losses = train_sft(run.policy, run.tokenizer, run.problems, cfg)
    show(f"loss      {losses[0]:.3f} in the first update, {losses[-1]:.3f} in the last of {len(losses)}")
    run.save_model("final")
    run.facts.update(first_loss=losses[0], last_loss=losses[-1], after=run.evaluate(len(losses)))

def reward_model(run):
    """A reward model from the preference pairs in --data [R1 2.3.4]; --model is what it starts from."""
    cfg = run.prepare()
    losses = train_reward_model(run.judge, run.problems, cfg)
    chosen = run.judge([(pair.completion, pair) for pair in run.held_out])
    rejected = run.judge([(pair.rejected, pair) for pair in run.held_out])
    accuracy = mean(map(operator.gt, chosen, rejected))
    show(f"judge     scores the better reply higher in {accuracy:.1%} of {len(chosen)} held-out pairs")
    run.save_model("final")
    run.facts.update(first_loss=losses[0], last_loss=losses[-1], held_out_accuracy=accuracy)

def sample(run):
    """Sample from --model right completions [R1 2.3.3] or, with general_data, preference pairs [R1 2.3.4]."""
    cfg = run.prepare()
    if cfg.general_data:
        given = [row for row in load_problems(cfg.general_data, whole=True) if row.rejected]
        write_problems(run.folder / "pairs.jsonl", preference_pairs(run.policy, run.tokenizer, given, cfg))
        return
    examples, faults = rejection_sample(run.policy, run.tokenizer, run.problems, cfg)
    if not examples:
        raise RunError(f"no completion of {cfg.model} is fit to learn from: {dict(faults)}; use easier data")
    write_problems(run.folder / "examples.jsonl", examples)
    show(f"examples  {len(examples):,}, of {faults.total():,} completions: {dict(faults)}")
    run.facts["faults"] = dict(faults)

def measure(run):
    """Evaluation [R1 3] of any checkpoint on any data: of a file, the first eval_problems."""
    run.prepare()
    samples = []
    run.facts["before"] = run.evaluate(0, samples)
    run.log("samples.jsonl", *samples)

STAGES = dict(zero=r1_zero, r1=r1, distill=distill, sft=sft, reward=reward_model, sample=sample, eval=measure)

# ---- Command line ------------------------------------------------------------------------------------------
GROUPS = dict(stage="what runs", template="prompts", cold_start="R1's stages and distillation", steps="GRPO",
              prompts_per_step="sampling", format_weight="rewards", sft_epochs="supervised training",
              micro_batch_tokens="memory", eval_every="evaluation")  # by their first setting

def refuse(message):
    """Raise InputError for what the command line cannot use."""
    raise InputError(f"{message}; python grpo.py --help explains every setting")

def build_parser():
    """Make a parser of Config: each field is a flag, in the group that it stands in."""
    parser = argparse.ArgumentParser(  # SUPPRESS: only what was typed counts
        usage="python grpo.py [--SETTING VALUE ...]", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description=__doc__.split("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, hints = refuse, get_type_hints(Config)
    for f in dataclasses.fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        hint = hints[f.name]
        words = dict(type=hint if hint in (int, float) else str, metavar="VALUE")
        if hint is bool:
            words = dict(action=argparse.BooleanOptionalAction)
        elif get_origin(hint) is Literal:
            words = dict(choices=get_args(hint))
        told = f"{f.metadata['help']} [{f.default!s:.40}]"
        told += f", tiny [{TINY[f.name]}]" if f.name in TINY else ""
        group.add_argument(f"--{f.name}", help=told, **words)
    return parser

def parse_args(argv):
    """Read the command line: what was typed, over the model's preset or the settings of a run to resume."""
    typed = vars(build_parser().parse_args(argv))
    if not typed.get("resume"):
        return make_config(**typed)
    first = Path("runs", typed.get("stage", "zero"), "config.json")
    newest = max(Path("runs").glob(f"{first.parent.name}*/config.json"), key=os.path.getmtime, default=first)
    folder = typed.setdefault("output_dir", str(newest.parent))
    try:
        cfg = Config(**json.loads(Path(folder, "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder}/config.json is missing, damaged or of another version: {error}") from None
    changed = [f"{name} was {getattr(cfg, name)!r} and is {value!r}" for name, value in typed.items()
               if value != getattr(cfg, name) and name not in MAY_CHANGE]
    if changed:
        raise InputError(f"{folder} holds a run, but {', '.join(changed)}; start a new run instead")
    return dataclasses.replace(cfg, **typed)

def carry_out(run):
    """Carry out a run, from first sentence to summary; if it fails before a checkpoint, its folder goes."""
    cfg = run.cfg
    try:
        summary = read_json(run.folder / "summary.json")
        if summary and summary["steps"] >= cfg.steps:
            return show(f"{run.folder} is finished; it goes on with more --steps")
        write_text(run.folder / "config.json", json.dumps(vars(cfg), indent=2, ensure_ascii=False) + "\n")
        needed = f"about {MINUTES.get(cfg.stage, 1)} minutes" if cfg.model in EMBEDDED else "see the bars"
        show(f"{STAGES[cfg.stage].__doc__.splitlines()[0]} Model: {cfg.model}; time: {needed}.")
        for name in ("model", "teacher", "reward_model"):  # a wrong name is told before any data is fetched
            if getattr(cfg, name) not in (None, *EMBEDDED):
                load_tokenizer(getattr(cfg, name), name)
        STAGES[cfg.stage](run)
        run.finish()
    except (InputError, OSError):
        if not cfg.resume and not any(run.folder.glob("*/")):  # no checkpoint, and no stage of a recipe
            shutil.rmtree(run.folder, ignore_errors=True)
        raise
    finally:
        run.lock.close()

def main(argv=None):
    """Run the command line -> 0, 1 (it cannot go on), 2 (bad input), 130 or 143 (stopped)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a curve must not end a run on an old terminal
    transformers.utils.logging.disable_progress_bar()  # it would show one for every file
    transformers.utils.logging.set_verbosity_error()  # a classifier's new head is no news
    status = 1
    try:
        run = Run(parse_args(sys.argv[1:] if argv is None else argv))
        try:
            carry_out(run)
            return 0
        except KeyboardInterrupt as stop:
            status = 128 + (stop.args[0] if stop.args else signal.SIGINT)
            told = f"stopped; go on with: python grpo.py --resume --output_dir {run.folder}"
    except InputError as error:
        status, told = 2, f"error: {error}"
    except torch.cuda.OutOfMemoryError:
        told = "stopped: out of GPU memory; lower micro_batch_tokens or max_rows"
    except (RunError, OSError) as error:
        told = f"stopped: {error}"
    print(f"grpo.py: {told}", file=sys.stderr)
    return status

if __name__ == "__main__":
    sys.exit(main())
