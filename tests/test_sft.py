"""Supervised training, rejection sampling, reward models. Oracles: numbers worked out by hand, transformers' own loss
and forward pass one row at a time, slow loops, and what must not depend on order, padding or micro-batches."""

import copy
import functools
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import grpo
from grpo import InputError, Problem, RewardModel, RunError, make_config


def settings(**overrides):
    return make_config(**{**dict(
        model="x", template="Q {question} A", max_completion_tokens=40, sft_batch_size=8, sft_epochs=1,
        sft_learning_rate=1e-2, gradient_checkpointing=False, micro_batch_tokens=10_000), **overrides})


EXAMPLES = [Problem("3 + 4?", completion=" 3 + 4 is 7 <answer> 7 </answer>"), Problem("1", completion="1"),
            Problem("What is it?", completion="<think> it </think> no"),
            Problem("A rather long question, is it not?", completion=" yes"),
            Problem("5 + 5", completion=" <think> 5 + 5 is 10 </think> <answer> 10 </answer>")]


@pytest.fixture
def updates(monkeypatch):
    """The (gradient, learning rate) of every update; no weight is changed by any."""
    seen = []

    def step(self, learning_rate, max_grad_norm=1.0):
        seen.append((torch.cat([p.grad.flatten() for p in self.masters if p.grad is not None]), learning_rate))
        self.adamw.zero_grad()

    monkeypatch.setattr(grpo.MasterAdamW, "step", step)
    return seen


# --- the loss


class Digits:
    """A tokenizer of digits; 0 begins, as with Llama's tokenizers whatever is encoded, and 2 ends."""

    eos_token_id, bos_token, chat_template = 2, "<|begin|>", None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [0] * add_special_tokens + [int(digit) for digit in text]}


def test_the_loss_is_the_mean_over_all_completion_tokens_of_an_update(updates, table_model):
    """ids 0 | 1 1 2: the row before each token predicts it; the prompt is given, a beginning token alone."""
    rows = [[2.0, 1, 0], [0, 3, 0], [1, 1, 1], [0.5, -0.5, 4]]
    train = lambda *examples: grpo.train_sft(table_model(rows), Digits(), examples, settings(template="{question}"))
    long, short = Problem("", completion="11"), Problem("1", completion="")  # 0 1 | 2
    first = (1.407606 + 0.094923 + 1.098612) / 3
    assert train(long) == [pytest.approx(first, abs=1e-6)]
    expected = torch.tensor(rows).softmax(-1)
    expected[[0, 1, 2], [1, 1, 2]] -= 1.0
    expected[3] = 0.0  # nothing follows the end token
    torch.testing.assert_close(updates[0][0], (expected / 3).flatten(), atol=1e-6, rtol=0)
    second = math.log(2 + math.exp(3))  # row 1 gives 2 a logit of 0
    assert train(short) == [pytest.approx(second, abs=1e-6)]
    assert train(long, short) == [pytest.approx((3 * first + second) / 4, abs=1e-6)]


def test_it_is_transformers_own_loss(architecture, make_model, plain, tokenizer, updates):
    model, rows = make_model(architecture), []
    other = plain(model)
    for example in EXAMPLES:  # as transformers wants them: padded, the prompt's labels -100
        prompt = tokenizer(f"Q {example.question} A")["input_ids"]
        completion = [*tokenizer(example.completion)["input_ids"], tokenizer.eos_token_id]
        pad = 60 - len(prompt + completion)
        rows.append((prompt + completion + [0] * pad, [1] * (60 - pad) + [0] * pad,
                     [-100] * len(prompt) + completion + [-100] * pad))
    ids, mask, labels = (torch.tensor(part) for part in zip(*rows))
    theirs = other(input_ids=ids, attention_mask=mask, labels=labels).loss
    theirs.backward()
    expected = torch.cat([weight.grad.flatten() for weight in other.parameters()])
    assert grpo.train_sft(model, tokenizer, EXAMPLES, settings()) == [pytest.approx(theirs.item(), abs=2e-6)]
    torch.testing.assert_close(updates[0][0], expected, atol=2e-6, rtol=0)
    assert expected.norm() > 1e-2


@pytest.mark.parametrize("change", (
    dict(micro_batch_tokens=1), dict(micro_batch_tokens=60), dict(seed=7), dict(gradient_checkpointing=True),
    dict(temperature=0.5)))
def test_what_changes_no_loss_and_no_gradient(change, make_model, tokenizer, updates):
    train = lambda examples, **given: grpo.train_sft(make_model(), tokenizer, examples, settings(**given))[0]
    losses = train(EXAMPLES), train(EXAMPLES, **change), train(EXAMPLES[::-1], **change)
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
    for gradient, _ in updates[1:]:
        torch.testing.assert_close(gradient, updates[0][0], atol=1e-6, rtol=0)


# --- examples


def test_examples_take_the_form_of_sampled_completions(tokenizer):
    data = grpo.encode_examples(tokenizer, EXAMPLES, settings(), "cpu")
    assert list(data.texts) == [example.completion for example in EXAMPLES] and not data.truncated.any()
    assert data.completion_mask.shape == (5, int(data.completion_tokens.max()))
    for row, example in enumerate(EXAMPLES):
        p, c = int(data.prompt_tokens[row]), int(data.completion_tokens[row])
        assert tokenizer.decode(data.ids[row, :p]) == f"Q {example.question} A"
        assert tokenizer.decode(data.ids[row, p : p + c - 1]) == example.completion
        assert data.ids[row, p + c - 1] == tokenizer.eos_token_id and data.completion_mask[row].sum() == c


def test_thoughts_that_the_prompt_has_opened_are_not_opened_twice(tokenizer):
    completions = ["<think> 7 </think> <answer> 7 </answer>", " 7 </think> <answer> 7 </answer>"]
    examples = [Problem("1", completion=completion) for completion in completions]
    opened = grpo.encode_examples(tokenizer, examples, settings(template="{question} <think>\n"), "cpu")
    assert [tokenizer.decode(row).count("<think>") for row in opened.ids] == [1, 1]
    assert list(opened.texts) == [" 7 </think> <answer> 7 </answer>"] * 2
    closed = grpo.encode_examples(tokenizer, examples, settings(template="<think> {question}:"), "cpu")
    assert list(closed.texts) == completions


def test_completions_that_are_too_long_are_left_out(tokenizer, capsys):
    tokens = [len(tokenizer(e.completion)["input_ids"]) + 1 for e in EXAMPLES]  # with the end token
    fits = sorted(set(tokens))[1]
    data = grpo.encode_examples(tokenizer, EXAMPLES, settings(max_completion_tokens=fits), "cpu")
    assert data.completion_tokens.tolist() == [n for n in tokens if n <= fits] and len(data.texts) == 2
    assert "3 of 5 examples" in capsys.readouterr().out
    with pytest.raises(InputError, match="max_completion_tokens"):
        grpo.encode_examples(tokenizer, EXAMPLES, settings(max_completion_tokens=1), "cpu")


# --- the schedule


@pytest.fixture
def train(updates, monkeypatch):
    """A function: supervised training of which only the schedule is real -> the texts and the rate of each update."""

    def schedule(count, **given):
        texts, weights = [], torch.nn.Linear(1, 1)

        def token_logprobs(model, rollout, temperature):
            texts.append([int(text) for text in rollout.texts])
            return weights(torch.ones(rollout.completion_mask.shape)[..., None])[..., 0]

        weights.device = torch.device("cpu")
        monkeypatch.setattr(grpo, "token_logprobs", token_logprobs)
        updates.clear()
        grpo.train_sft(weights, Digits(), [Problem("", completion=str(i)) for i in range(count)],
                       settings(template="{question}", sft_learning_rate=1.0, **given))
        return texts, [rate for _, rate in updates]

    return schedule


def test_the_learning_rate_falls_along_a_cosine_to_a_tenth(train):
    _, rates = train(8, sft_epochs=2, sft_batch_size=2)
    assert len(rates) == 8 and rates == sorted(rates, reverse=True) and rates[0] == 1
    assert rates[2:5:2] == pytest.approx([0.55 + 0.45 * math.sqrt(0.5), 0.55])  # cos 45° and 90°
    assert train(500, sft_batch_size=1)[1][-1] == pytest.approx(0.1, abs=1e-5)


@pytest.mark.parametrize("count, batch, epochs", [(7, 3, 3), (8, 4, 1), (3, 100, 2), (1, 1, 5)])
def test_every_example_is_seen_once_an_epoch(count, batch, epochs, train):
    batches, _ = train(count, sft_epochs=epochs, sft_batch_size=batch)
    seen = sum(batches, [])
    assert len(batches) == epochs * -(-count // batch) and max(map(len, batches)) == min(batch, count)
    assert all(sorted(seen[first:][:count]) == list(range(count)) for first in range(0, epochs * count, count))
    assert seen[:count] != seen[count : 2 * count] or epochs == 1 or count < 7
    assert batches == train(count, sft_epochs=epochs, sft_batch_size=batch)[0]  # by the seed alone


# --- training


def test_a_model_learns_its_examples(architecture, make_model, tokenizer):
    model = make_model(architecture)
    losses = grpo.train_sft(model, tokenizer, EXAMPLES[:2], settings(sft_epochs=30))
    assert len(losses) == 30 and losses[0] > 4 and losses[-1] < 0.3, losses
    rollout = grpo.sample_completions(model, tokenizer, [f"Q {example.question} A" for example in EXAMPLES[:2]],
                                      group_size=1, max_completion_tokens=40, temperature=0)
    assert rollout.texts == [example.completion for example in EXAMPLES[:2]] and not rollout.truncated.any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_bfloat16_learns_too_and_what_is_not_finite_ends_it(dtype, make_model, tokenizer):
    model = make_model(dtype=dtype)
    losses = grpo.train_sft(model, tokenizer, EXAMPLES, settings(sft_epochs=8))
    assert losses[-1] < 0.6 * losses[0]
    next(model.parameters()).data[:] = float("nan")
    with pytest.raises(RunError, match="loss of update 1 is not finite; lower sft_learning_rate"):
        grpo.train_sft(model, tokenizer, EXAMPLES, settings())


# --- rejection sampling

RIGHT = "<think> it is {} </think> <answer> 7 </answer>"


@pytest.mark.parametrize("max_rows", (4, 8))  # in two batches, and in one
def test_the_first_faultless_completion_of_each_problem_is_kept(max_rows, monkeypatch):
    texts = {"Q 3 + 4? A": [RIGHT.format("cut"), RIGHT.format("我"), RIGHT.format("seven"), RIGHT.format("again")],
             "Q 7? A": ["<answer> 7 </answer>", RIGHT.format("so").replace("7", "8"), "<think> it", RIGHT.format("我")]}

    def sample_completions(model, tokenizer, prompts, *, group_size, **_):
        rows = [text for prompt in prompts for text in texts[prompt][:group_size]]
        return SimpleNamespace(texts=rows, truncated=torch.tensor(["cut" in text for text in rows]))

    monkeypatch.setattr(grpo, "sample_completions", sample_completions)
    cfg = settings(rejection_samples=4, group_size=4, eval_samples=4, max_rows=max_rows)
    examples, faults = grpo.rejection_sample(None, None, [Problem("3 + 4?", "7"), Problem("7?", "7")], cfg)
    assert examples == [Problem("3 + 4?", "7", completion=RIGHT.format("seven"))]
    assert faults == {"none": 2, "truncated": 1, "mixed language": 2, "unreadable": 1, "not right": 2}


# --- reward models


@pytest.fixture(scope="session")
def classifier(tmp_path_factory, make_model, tokenizer):
    """A function: the folder of a random classifier with one label."""

    @functools.cache
    def make(architecture="qwen2"):
        folder, config = tmp_path_factory.mktemp("classifier"), copy.deepcopy(make_model(architecture).config)
        config.num_labels = 1
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        for weight in model.parameters():
            weight.data.add_(0.1 * torch.randn_like(weight))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def judge_of(path, **changes):
    return RewardModel(path, settings(**changes), torch.device("cpu"))


ROWS = [(example.completion, Problem(example.question, task="harmless")) for example in EXAMPLES]


@pytest.mark.parametrize("micro_batch_tokens", (1, 120, 10_000))
def test_scores_are_transformers_own_one_row_at_a_time(architecture, micro_batch_tokens, classifier, tokenizer):
    path, expected, end = classifier(architecture), [], tokenizer.eos_token
    rows = [*ROWS, *((text + end + rest, problem) for (text, problem), rest in zip(ROWS, ("", "7", end)))]
    judge = judge_of(path, micro_batch_tokens=micro_batch_tokens)
    model = AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager")
    assert judge.model.config.pad_token_id == tokenizer.eos_token_id  # the hard case: padding is a token of the text
    for text, problem in rows:
        ids = judge.tokenizer(f"Q {problem.question} A{text}")["input_ids"]  # the one it loaded
        expected.append(model(input_ids=torch.tensor([ids])).logits.item())
    assert judge(rows) == pytest.approx(expected, abs=1e-5) and max(expected) - min(expected) > 0.1
    assert judge(rows[::-1]) == pytest.approx(expected[::-1], abs=1e-5)


def test_it_is_float32_whatever_was_saved(classifier, tmp_path):
    """Near 5 bfloat16 resolves 0.03, so that different replies would seem equal."""
    folder = shutil.copytree(classifier(), tmp_path / "half")
    AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    judge = judge_of(str(folder))
    assert {weight.dtype for weight in judge.model.parameters()} == {torch.float32}
    scores = torch.tensor(judge(ROWS))
    assert not torch.equal(scores, scores.bfloat16().float())


def test_what_the_reward_model_sees(classifier):
    text = "<think> bad thoughts </think> <answer> hello </answer>"
    for task, completion, seen in (
            ("helpful", text, "<answer> hello </answer>"), ("harmless", text, text), ("helpful", "hello", "hello"),
            ("helpful", "a</think>b</think> c", "c"), ("helpful", "<think> a", ""), ("harmless", "<think>", "<think>")):
        assert grpo.judged_part(completion, Problem("q", task=task)) == seen
    judge, other = judge_of(classifier()), text.replace("bad", "good")
    one, two, three, four = judge([(t, Problem("q", task=task)) for task in grpo.GENERAL for t in (text, other)])
    assert one == pytest.approx(two, abs=1e-6) and abs(three - four) > 1e-3
    judge = judge_of(classifier(), chat_template=True)  # it reads the prompt that the policy reads
    judge.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} [assistant] {% endfor %}"
    ids = judge.encode("<think> x </think> seven", Problem("3 + 4?", task="helpful"))
    assert judge.tokenizer.decode(ids) == "[user] 3 + 4? [assistant] seven"


def test_a_model_without_a_trained_head_is_no_judge(make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="reward_model"):
        judge_of(str(tmp_path))
    RewardModel(str(tmp_path), settings(), torch.device("cpu"), untrained=True)


PAIRS = [Problem(f"{i} + {i}?", task=("helpful", "harmless")[i % 2], rejected=f"<think> {i} </think> What is {i}? User",
                 completion=f"<think> {i} </think> <answer> {i} </answer>") for i in range(12)]


@pytest.mark.parametrize("micro_batch_tokens", (1, 150, 10_000))
def test_the_loss_of_a_reward_model_by_a_slow_loop(micro_batch_tokens, classifier, updates):
    """Bradley and Terry's, -log σ(r_chosen - r_rejected), as it is written, pair by pair."""
    judge, expected = judge_of(classifier()), 0.0
    model = copy.deepcopy(judge.model)
    for pair in PAIRS:
        good, bad = (model(input_ids=torch.tensor([judge.encode(text, pair)])).logits[0, 0]
                     for text in (pair.completion, pair.rejected))
        loss = -torch.log(1 / (1 + torch.exp(bad - good))) / len(PAIRS)
        loss.backward()
        expected += loss.item()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    cfg = settings(sft_batch_size=12, micro_batch_tokens=micro_batch_tokens)
    assert grpo.train_reward_model(judge, PAIRS, cfg) == [pytest.approx(expected, rel=1e-5)]
    torch.testing.assert_close(updates[0][0], gradient, atol=1e-5, rtol=1e-4)
    assert gradient.norm() > 1e-2


def test_a_reward_model_learns_what_is_preferred(classifier):
    judge = judge_of(classifier())
    losses = grpo.train_reward_model(judge, PAIRS[:8], settings(sft_epochs=8, sft_batch_size=4))
    assert len(losses) == 16 and losses[-1] < 0.2 < losses[0], losses
    good, bad = judge([(p.completion, p) for p in PAIRS[8:]]), judge([(p.rejected, p) for p in PAIRS[8:]])
    assert all(g > b for g, b in zip(good, bad)) and not judge.model.training  # on pairs it has not seen
