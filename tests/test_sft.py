"""Supervised training and reward models. Oracles: numbers worked out by hand, transformers' own loss and forward pass
one row at a time, float64, and what must not depend on order, padding or the size of a micro-batch."""

import copy
import dataclasses
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import grpo
from grpo import InputError, Problem, RewardModel, RunError, make_config


def settings(**overrides):
    return make_config(
        **{
            **dict(
                model="x",
                template="Q {question} A",
                max_completion_tokens=40,
                sft_batch_size=8,
                sft_epochs=1,
                sft_learning_rate=1e-2,
                gradient_checkpointing=False,
                micro_batch_tokens=10_000,
                logits_chunk_tokens=16,
                max_grad_norm=1e9,
            ),
            **overrides,
        }
    )


EXAMPLES = [
    Problem("3 + 4?", completion=" 3 + 4 is 7 <answer> 7 </answer>"),
    Problem("What is it?", completion="<think> it </think> no"),
    Problem("1", completion="1"),
    Problem("A rather long question, is it not?", completion=" yes"),
    Problem("5 + 5", completion=" <think> 5 + 5 is 10 </think> <answer> 10 </answer>"),
]


@pytest.fixture
def updates(monkeypatch):
    """The (gradient, learning rate) of every update; no weight is changed by any."""
    seen = []

    class Keep:
        def __init__(self, model, learning_rate):
            self.model = model

        def accumulate(self):
            """The gradients of float32 weights add up by themselves."""

        def step(self, learning_rate, max_grad_norm):
            gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
            seen.append((torch.cat(gradients), learning_rate))
            self.model.zero_grad()
            return 0.0

    monkeypatch.setattr(grpo, "MasterAdamW", Keep)
    return seen


# --- the loss


class Table(torch.nn.Module):
    """A model without a transformer: its logits at position p are row p of a table, whatever the tokens."""

    def __init__(self, rows):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(rows))
        self.device = torch.device("cpu")

    def base_model(self, input_ids, use_cache):
        batch, length = input_ids.shape
        return SimpleNamespace(last_hidden_state=self.table[:length].expand(batch, -1, -1))

    def get_output_embeddings(self):
        return lambda hidden: hidden


class Digits:
    """A tokenizer of digits; 2 ends."""

    eos_token_id, bos_token, chat_template = 2, None, None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [int(digit) for digit in text]}


ROWS = [[2.0, 1.0, 0.0], [0.0, 3.0, 0.0], [1.0, 1.0, 1.0], [0.5, -0.5, 4.0]]


def test_the_loss_is_the_mean_over_the_completion_with_its_end_token(updates):
    """ids 0 | 1 1 2: the row before each token predicts it; the prompt's 0 is given."""
    model = Table(ROWS)
    losses = grpo.train_sft(model, Digits(), [Problem("0", completion="11")], settings(template="{question}"))
    assert losses == [pytest.approx(0.867047, abs=1e-6)]
    assert losses[0] == pytest.approx((1.407606 + 0.094923 + 1.098612) / 3, abs=1e-6)
    ((gradient, _),) = updates
    expected = torch.tensor(ROWS).softmax(-1)
    expected[[0, 1, 2], [1, 1, 2]] -= 1.0
    expected[3] = 0.0  # nothing follows the end token
    torch.testing.assert_close(gradient, (expected / 3).flatten(), atol=1e-6, rtol=0)


def test_every_token_of_an_update_weighs_the_same(updates):
    """A long completion counts by its tokens: -(1.407606 + .094923 + 1.098612 + 1.098612... over all) / all."""
    model, cfg = Table(ROWS), settings(template="{question}")
    examples = [Problem("0", completion="11"), Problem("01", completion="")]  # 0 1 | 2
    alone = [grpo.train_sft(model, Digits(), [example], cfg)[0] for example in examples]
    assert alone[1] == pytest.approx(math.log(2 + math.exp(3)), abs=1e-6)  # row 1 gives 2 a logit of 0
    assert grpo.train_sft(model, Digits(), examples, cfg) == [pytest.approx((3 * alone[0] + alone[1]) / 4)]


def padded(tokenizer, cfg, examples=EXAMPLES):
    """ids, attention mask and labels as transformers wants them, by a slow loop."""
    rows = []
    for example in examples:
        prompt = tokenizer(cfg.template.replace("{question}", example.question))["input_ids"]
        completion = [*tokenizer(example.completion)["input_ids"], tokenizer.eos_token_id]
        rows.append((prompt + completion, [-100] * len(prompt) + completion))
    width = max(len(ids) for ids, _ in rows)
    ids, mask, labels = (
        torch.tensor(
            [
                (ids, [1] * len(ids), label)[i] + [(tokenizer.pad_token_id, 0, -100)[i]] * (width - len(ids))
                for ids, label in rows
            ]
        )
        for i in range(3)
    )
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def test_it_is_transformers_own_loss(architecture, make_model, plain, tokenizer, updates):
    model, cfg = make_model(architecture), settings()
    other = plain(model)
    losses = grpo.train_sft(model, tokenizer, EXAMPLES, cfg)
    theirs = other(**padded(tokenizer, cfg)).loss
    theirs.backward()
    expected = torch.cat([weight.grad.flatten() for weight in other.parameters()])
    assert losses == [pytest.approx(theirs.item(), abs=2e-6)]
    torch.testing.assert_close(updates[0][0], expected, atol=2e-6, rtol=0)
    assert expected.norm() > 1e-2


@pytest.mark.parametrize("change", ({"micro_batch_tokens": 1}, {"micro_batch_tokens": 60}, {"seed": 7}))
def test_micro_batches_order_and_padding_change_nothing(change, make_model, tokenizer, updates):
    model, cfg = make_model(), settings()
    losses = [
        grpo.train_sft(model, tokenizer, examples, dataclasses.replace(cfg, **given))[0]
        for examples, given in ((EXAMPLES, {}), (EXAMPLES, change), (EXAMPLES[::-1], change))
    ]
    assert losses == [pytest.approx(losses[0], abs=1e-6)] * 3
    for gradient, _ in updates[1:]:
        torch.testing.assert_close(gradient, updates[0][0], atol=1e-6, rtol=0)


def test_gradient_checkpointing_changes_nothing(make_model, tokenizer, updates):
    losses = [
        grpo.train_sft(make_model(), tokenizer, EXAMPLES, settings(gradient_checkpointing=recompute))
        for recompute in (False, True)
    ]
    assert losses[0] == [pytest.approx(losses[1][0], abs=1e-6)]
    torch.testing.assert_close(updates[0][0], updates[1][0], atol=1e-6, rtol=0)


def test_the_temperature_of_sampling_has_no_part_in_it(make_model, tokenizer, updates):
    model = make_model()
    one, other = (
        grpo.train_sft(model, tokenizer, EXAMPLES, settings(temperature=temperature))
        for temperature in (1.0, 0.5)
    )
    assert one == other


# --- examples


def test_examples_take_the_form_of_sampled_completions(tokenizer):
    cfg = settings()
    data = grpo.encode_examples(tokenizer, EXAMPLES, cfg, "cpu")
    assert data.texts == [example.completion for example in EXAMPLES] and not data.truncated.any()
    assert data.completion_mask.shape == (5, int(data.completion_tokens.max()))
    for row, example in enumerate(EXAMPLES):
        p, c = int(data.prompt_tokens[row]), int(data.completion_tokens[row])
        assert tokenizer.decode(data.ids[row, :p]) == f"Q {example.question} A"
        assert tokenizer.decode(data.ids[row, p : p + c - 1]) == example.completion
        assert data.ids[row, p + c - 1] == tokenizer.eos_token_id
        assert data.completion_mask[row].sum() == c


def test_thoughts_that_the_prompt_has_opened_are_not_opened_twice(tokenizer):
    completions = ["<think> 7 </think> <answer> 7 </answer>", " 7 </think> <answer> 7 </answer>"]
    examples = [Problem("1", completion=completion) for completion in completions]
    opened = grpo.encode_examples(tokenizer, examples, settings(template="{question} <think>\n"), "cpu")
    assert [tokenizer.decode(row).count("<think>") for row in opened.ids] == [1, 1]
    assert opened.texts == [" 7 </think> <answer> 7 </answer>"] * 2
    closed = grpo.encode_examples(tokenizer, examples, settings(template="<think> {question}:"), "cpu")
    assert closed.texts == completions


def test_a_beginning_token_stands_before_the_prompt_only(tokenizer):
    class Beginning:
        """As Llama's tokenizers: a first token before whatever is encoded."""

        eos_token_id, chat_template, bos_token = tokenizer.eos_token_id, None, "<|begin|>"

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [299] * add_special_tokens + tokenizer(text)["input_ids"]}

    data = grpo.encode_examples(Beginning(), EXAMPLES, settings(), "cpu")
    assert (data.ids == 299).sum(1).tolist() == [1] * 5 and (data.ids[:, 0] == 299).all()


def test_completions_that_are_too_long_are_left_out(tokenizer, capsys):
    tokens = [len(tokenizer(e.completion)["input_ids"]) + 1 for e in EXAMPLES]  # with the end token
    fits = sorted(set(tokens))[1]
    data = grpo.encode_examples(tokenizer, EXAMPLES, settings(max_completion_tokens=fits), "cpu")
    assert data.completion_tokens.tolist() == [n for n in tokens if n <= fits] and len(data.texts) == 2
    assert f"3 of 5 examples are longer than max_completion_tokens ({fits})" in capsys.readouterr().out
    with pytest.raises(InputError, match="none of the 5 completions .* max_completion_tokens 1 tokens"):
        grpo.encode_examples(tokenizer, EXAMPLES, settings(max_completion_tokens=1), "cpu")


# --- the schedule


def test_the_learning_rate_falls_along_a_cosine_to_a_tenth():
    cfg = settings(sft_learning_rate=1.0, sft_epochs=2, sft_batch_size=2)
    rates = [rate for _, rate in grpo.sft_schedule(cfg, 8)]
    assert len(rates) == 8
    assert rates[0] == 1.0 and rates[4] == pytest.approx(0.55)
    assert rates[2] == pytest.approx(0.55 + 0.45 * math.sqrt(0.5))  # cos 45°
    assert rates == sorted(rates, reverse=True)
    many = [r for _, r in grpo.sft_schedule(dataclasses.replace(cfg, sft_batch_size=1), 500)]
    assert many[-1] == pytest.approx(0.1, abs=1e-5) and min(many) >= 0.1


@pytest.mark.parametrize("count, batch, epochs", [(7, 3, 3), (8, 4, 1), (3, 100, 2), (1, 1, 5)])
def test_every_example_is_seen_once_an_epoch(count, batch, epochs):
    cfg = settings(sft_epochs=epochs, sft_batch_size=batch)
    batches = [rows.tolist() for rows, _ in grpo.sft_schedule(cfg, count)]
    seen = [row for rows in batches for row in rows]
    assert len(batches) == epochs * -(-count // batch) and max(map(len, batches)) == min(batch, count)
    for epoch in range(epochs):
        assert sorted(seen[epoch * count :][:count]) == list(range(count))
    if count > 6:
        assert seen[:count] != seen[count : 2 * count] or epochs == 1
    assert batches == [rows.tolist() for rows, _ in grpo.sft_schedule(cfg, count)]  # by the seed alone


def test_max_seconds_ends_it_and_sets_the_learning_rate(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(grpo.time, "perf_counter", lambda: now[0])
    cfg = settings(sft_learning_rate=1.0, sft_epochs=100, sft_batch_size=4, max_seconds=8.0)
    rates, seen = [], []
    for rows, rate in grpo.sft_schedule(cfg, 4):
        rates.append(rate)
        seen += [rows.tolist()]
        now[0] += 2.0
    assert rates == [pytest.approx(r) for r in (1.0, 0.55 + 0.45 * math.sqrt(0.5), 0.55, 0.55 - 0.318198)]
    assert all(sorted(rows) == [0, 1, 2, 3] for rows in seen)
    few = settings(sft_epochs=3, sft_batch_size=4, max_seconds=1e9)
    assert len(list(grpo.sft_schedule(few, 4))) == 3  # whichever ends first


# --- training


def test_a_model_learns_its_examples(architecture, make_model, tokenizer):
    model, cfg = make_model(architecture), settings(sft_epochs=30, sft_batch_size=5, max_grad_norm=1.0)
    losses = grpo.train_sft(model, tokenizer, EXAMPLES[:2], cfg)
    assert len(losses) == 30 and losses[0] > 4 and losses[-1] < 0.3, losses
    prompts = [f"Q {example.question} A" for example in EXAMPLES[:2]]
    rollout = grpo.sample_completions(
        model, tokenizer, prompts, group_size=1, max_completion_tokens=40, temperature=0
    )
    assert rollout.texts == [example.completion for example in EXAMPLES[:2]] and not rollout.truncated.any()


def test_the_learning_rates_of_the_schedule_reach_the_optimizer(make_model, tokenizer, updates):
    cfg = settings(sft_epochs=2, sft_batch_size=2)
    grpo.train_sft(make_model(), tokenizer, EXAMPLES, cfg)
    assert [rate for _, rate in updates] == [rate for _, rate in grpo.sft_schedule(cfg, 5)]


def test_bfloat16_on_a_gpu_learns_too(device_and_dtype, make_model, tokenizer):
    device, dtype = device_and_dtype
    model = make_model(device=device, dtype=dtype)
    losses = grpo.train_sft(model, tokenizer, EXAMPLES, settings(sft_epochs=8))
    assert losses[-1] < 0.6 * losses[0]


def test_a_loss_that_is_not_finite_ends_it(make_model, tokenizer):
    model = make_model()
    with torch.no_grad():
        next(model.parameters())[:] = float("nan")
    with pytest.raises(RunError, match="loss of update 1 is not finite; lower sft_learning_rate"):
        grpo.train_sft(model, tokenizer, EXAMPLES, settings())


@pytest.mark.parametrize("lengths", ([5, 3, 9, 9, 1, 4], [7] * 5, [1], []))
@pytest.mark.parametrize("max_tokens", (1, 9, 18, 1000))
def test_packed_batches_hold_every_row_once_and_no_more_than_allowed(lengths, max_tokens):
    batches = grpo.pack(lengths, max_tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= max_tokens
    assert len(batches) == len(lengths) if max_tokens == 1 else len(batches) <= len(lengths)
    if max_tokens == 1000:
        assert len(batches) == bool(lengths)


# --- reward models


def test_bradley_terry_loss_by_hand():
    loss = lambda a, b: grpo.bradley_terry_loss(torch.tensor(a), torch.tensor(b)).item()
    assert loss([3.0], [3.0]) == pytest.approx(math.log(2))
    assert loss([1.0], [0.0]) == pytest.approx(0.313262, abs=1e-6)  # ln(1 + 1/e)
    assert loss([0.0], [1.0]) == pytest.approx(1.313262, abs=1e-6)
    assert loss([1.0, 0.0], [0.0, 1.0]) == pytest.approx((0.313262 + 1.313262) / 2, abs=1e-6)
    assert loss([0.0], [300.0]) == pytest.approx(300.0)  # where the formula as written overflows


def test_bradley_terry_loss_is_its_formula_in_float64():
    draw = torch.Generator().manual_seed(0)
    chosen, rejected = (5 * torch.randn(50, generator=draw).requires_grad_() for _ in range(2))
    loss = grpo.bradley_terry_loss(chosen, rejected)
    difference = (chosen - rejected).detach().double()
    wins = 1 / (1 + torch.exp(-difference))
    assert loss.item() == pytest.approx(-wins.log().mean().item(), rel=1e-6)
    gradient = torch.autograd.grad(loss, [chosen, rejected])
    torch.testing.assert_close(gradient[0].double(), (wins - 1) / 50, atol=1e-7, rtol=0)
    torch.testing.assert_close(gradient[1], -gradient[0])


@pytest.fixture(scope="session")
def classifier(tmp_path_factory, make_model, tokenizer):
    """A function: the folder of a random classifier with one label."""

    @functools.cache
    def make(architecture="qwen2", spread=0.1):
        folder = tmp_path_factory.mktemp("classifier")
        config = copy.deepcopy(make_model(architecture).config)
        config.num_labels = 1
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(spread * torch.randn_like(weight))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def judge_of(path, **changes):
    return RewardModel(path, settings(**changes), torch.device("cpu"), torch.float32)


def test_scores_are_transformers_own_one_row_at_a_time(architecture, classifier, tokenizer):
    path = classifier(architecture)
    judge = judge_of(path, micro_batch_tokens=120)
    model = AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager")
    assert judge.model.config.pad_token_id == tokenizer.eos_token_id  # the hard case: it also ends
    problems = [dataclasses.replace(example, task="harmless") for example in EXAMPLES]
    scores = judge([example.completion for example in EXAMPLES], problems)
    expected = []
    for example in EXAMPLES:
        ids = judge.tokenizer(f"Q {example.question} A{example.completion}")["input_ids"]  # the one it loaded
        with torch.no_grad():
            expected.append(model(input_ids=torch.tensor([ids])).logits.item())
    assert scores == [pytest.approx(value, abs=1e-5) for value in expected]
    assert max(expected) - min(expected) > 0.1


@pytest.mark.parametrize("micro_batch_tokens", (1, 50, 10_000))
def test_scores_depend_on_no_neighbour(micro_batch_tokens, classifier):
    judge = judge_of(classifier(), micro_batch_tokens=micro_batch_tokens)
    problems = [dataclasses.replace(example, task="harmless") for example in EXAMPLES]
    texts = [example.completion for example in EXAMPLES]
    together = judge(texts, problems)
    assert judge(texts[::-1], problems[::-1]) == [pytest.approx(v, abs=1e-5) for v in together[::-1]]
    assert [judge([t], [p])[0] for t, p in zip(texts, problems)] == [
        pytest.approx(v, abs=1e-5) for v in together
    ]


def test_a_row_that_ends_with_the_padding_token_is_scored_as_if_it_were_alone(classifier, tokenizer):
    judge, end = judge_of(classifier()), tokenizer.eos_token_id
    rows = [[5, 9, 12, end], [5, 9, end, 12, 7, 8, 30, 31], [end, 6]]
    with torch.no_grad():
        together = judge.scores(rows)
        alone = torch.cat([judge.scores([row]) for row in rows])
    assert together.dtype == torch.float32 and together.shape == (3,)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_what_the_reward_model_sees():
    text = "<think> bad thoughts </think> <answer> hello </answer>"
    assert grpo.judged_part(text, Problem("q", task="helpful")) == "<answer> hello </answer>"
    assert grpo.judged_part(text, Problem("q", task="harmless")) == text
    assert grpo.judged_part("hello", Problem("q", task="helpful")) == "hello"
    assert grpo.judged_part("a</think>b</think> c", Problem("q", task="helpful")) == "c"


def test_only_the_final_part_of_a_helpful_reply_counts(classifier):
    judge = judge_of(classifier())
    texts = ["<think> one </think> <answer> 7 </answer>", "<think> 3 + 4 </think> <answer> 7 </answer>"]
    helpful = judge(texts, [Problem("q", task="helpful")] * 2)
    harmless = judge(texts, [Problem("q", task="harmless")] * 2)
    assert helpful[0] == pytest.approx(helpful[1], abs=1e-6) and abs(harmless[0] - harmless[1]) > 1e-3


def test_a_chat_template_of_the_reward_model_is_used(classifier):
    judge = judge_of(classifier())
    judge.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    ids = judge.encode("<think> x </think> seven", Problem("3 + 4?", task="helpful"))
    assert judge.tokenizer.decode(ids) == "[user] 3 + 4? [assistant] seven "


def test_a_model_without_a_trained_head_is_no_judge(classifier, make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="reward_model .* is no classifier with one label: it lacks score"):
        judge_of(str(tmp_path))
    RewardModel(str(tmp_path), settings(), torch.device("cpu"), torch.float32, untrained=True)


PAIRS = [
    Problem(
        f"{i} + {i}?",
        task=("helpful", "harmless")[i % 2],
        completion=f"<think> {i} </think> <answer> {i} </answer>",
        rejected=f"<think> {i} </think> What is {i}? User",
    )
    for i in range(12)
]


@pytest.fixture
def pair_judge(classifier):
    return judge_of(classifier(), sft_batch_size=8)


@pytest.mark.parametrize("micro_batch_tokens", (1, 150, 10_000))
def test_the_loss_of_a_reward_model_by_a_slow_loop(micro_batch_tokens, pair_judge, updates):
    cfg = settings(sft_batch_size=12, micro_batch_tokens=micro_batch_tokens)
    model, expected = copy.deepcopy(pair_judge.model), 0.0
    for pair in PAIRS:
        good, bad = (
            model(input_ids=torch.tensor([pair_judge.encode(text, pair)])).logits[0, 0]
            for text in (pair.completion, pair.rejected)
        )
        loss = -torch.log(1 / (1 + torch.exp(bad - good))) / len(PAIRS)
        loss.backward()
        expected += loss.item()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert grpo.train_reward_model(pair_judge, PAIRS, cfg) == [pytest.approx(expected, rel=1e-5)]
    torch.testing.assert_close(updates[0][0], gradient, atol=1e-5, rtol=1e-4)
    assert gradient.norm() > 1e-2


def test_a_reward_model_learns_what_is_preferred(pair_judge):
    cfg = settings(sft_epochs=8, sft_batch_size=4, max_grad_norm=1.0)
    losses = grpo.train_reward_model(pair_judge, PAIRS[:8], cfg)
    assert len(losses) == 16 and losses[-1] < 0.2 < losses[0], losses
    good = pair_judge([pair.completion for pair in PAIRS[8:]], PAIRS[8:])
    bad = pair_judge([pair.rejected for pair in PAIRS[8:]], PAIRS[8:])
    assert all(g > b for g, b in zip(good, bad))  # on pairs it has not seen
    assert not pair_judge.model.training
