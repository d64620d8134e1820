"""Optimiser, update and the loop. Oracles: torch's AdamW, sums in float32, the formula written out over a plain forward
pass, one big batch instead of many small ones, and what must be equal to the last bit."""

import copy
import dataclasses
import math
from collections import Counter

import pytest
import torch

import grpo
from grpo import MasterAdamW, Problem, make_config, sample_completions, token_logprobs, train_grpo, update_policy

AVERAGES, DTYPES = ("sequence", "token", "constant"), (torch.float32, torch.bfloat16)


class Weights(torch.nn.Module):
    """Parameters and nothing else."""

    def __init__(self, *values, dtype=torch.float32):
        super().__init__()
        self.values = torch.nn.ParameterList(torch.tensor(value, dtype=dtype) for value in values)
        self.device = torch.device("cpu")


def settings(**overrides):
    return make_config(**{**dict(
        model="x", prompts_per_step=2, group_size=4, max_completion_tokens=12, kl_coef=0.0, steps=3, max_rows=8,
        learning_rate=1e-2, gradient_checkpointing=False, micro_batch_tokens=64), **overrides})


def weights_of(model):
    return [weight.detach().clone() for weight in model.parameters()]


def same(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Keep:
    """An optimizer that only looks at the gradient."""

    def __init__(self, model):
        self.model = model

    def accumulate(self):
        pass  # the gradients of float32 weights add up by themselves

    def step(self, *_):
        self.gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        self.model.zero_grad()
        return 0.0


def gradient_of(model, rollout, **overrides):
    keep = Keep(model)
    sums = update_policy(model, keep, rollout, settings(**overrides), 1e-3)
    return keep.gradient, sums


# --- master weights


@pytest.mark.parametrize("weight, smallest", [(0.1, 1e-3), (0.02, 1e-4), (0.001, 1e-5), (0.0002, 1e-6)])
def test_bfloat16_swallows_small_steps_and_the_master_does_not(weight, smallest):
    for learning_rate in (1e-7, 1e-6, 3e-6, 1e-5, 1e-4, 1e-3):
        model = Weights([weight], dtype=torch.bfloat16)
        optimizer, before = MasterAdamW(model, learning_rate), model.values[0].item()
        model.values[0].sum().backward()
        optimizer.step(learning_rate)
        assert (model.values[0].item() != before) == (learning_rate >= smallest)
        assert before - optimizer.masters[0].item() == pytest.approx(learning_rate, rel=1e-2, abs=1e-8)


def test_many_small_steps_move_a_bfloat16_weight():
    model = Weights([0.02], dtype=torch.bfloat16)
    optimizer, before = MasterAdamW(model, 1e-6), model.values[0].item()
    for _ in range(200):
        model.values[0].sum().backward()
        optimizer.step(1e-6)
    assert before - model.values[0].item() == pytest.approx(2e-4, rel=0.3)
    assert model.values[0] == optimizer.masters[0].bfloat16()


def test_gradients_of_micro_batches_are_added_in_float32():
    model = Weights([0.5, 0.5], dtype=torch.bfloat16)
    optimizer, weight = MasterAdamW(model, 1e-3), model.values[0]
    for scale in [1.0] + [2.0**-10] * 512:  # in bfloat16 each of the small ones is lost
        (scale * weight * torch.tensor([1.0, -2.0], dtype=torch.bfloat16)).sum().backward()
        optimizer.accumulate()
    assert optimizer.step(1e-3) == pytest.approx(math.hypot(1.5, 3.0))


def test_in_float32_it_is_torchs_adamw(make_model, random_rollout):
    model = make_model()
    other, ours = copy.deepcopy(model), MasterAdamW(model, 1e-3)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(5):
        for m in (model, other):
            (3 * token_logprobs(m, random_rollout(seed=step), 1.0).sum()).backward()
        norm = ours.step(1e-3 / (step + 1), 0.5)
        assert norm == float(torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)) and norm > 0.5
        theirs.param_groups[0]["lr"] = 1e-3 / (step + 1)
        theirs.step()
        theirs.zero_grad()
    torch.testing.assert_close(weights_of(model), weights_of(other), atol=1e-7, rtol=0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_a_gradient_that_is_not_finite_changes_no_bit(dtype, bad):
    optimizer = MasterAdamW(model := Weights([0.1, 0.2], [0.3], dtype=dtype), 1e-3)
    sum(value.sum() for value in model.values).backward()
    optimizer.step(1e-3)
    everything = lambda: weights_of(model) + [m.detach().clone() for m in optimizer.masters] + [
        t.clone() for s in optimizer.adamw.state.values() for t in s.values()]
    before = everything()
    (model.values[0].sum() * bad + model.values[1].sum()).backward()
    assert not math.isfinite(optimizer.step(1e-3)) and same(before, everything())
    sum(value.sum() for value in model.values).backward()  # and the bad gradient is forgotten
    assert math.isfinite(optimizer.step(1e-3)) and not same(before, everything())


# --- one update


def test_micro_batches_hold_every_row_once_and_no_more_tokens_than_allowed(random_rollout):
    rollout = random_rollout(rows=40)
    lengths = rollout.prompt_tokens + rollout.completion_tokens
    for max_tokens in (1, 20, 50, 10_000):
        batches = grpo.micro_batches(rollout, max_tokens)
        assert sorted(torch.cat(batches).tolist()) == list(range(40))
        assert all(len(rows) == 1 or len(rows) * lengths[rows].max() <= max_tokens for rows in batches)
        assert len(batches) == {1: 40, 10_000: 1}.get(max_tokens, len(batches))
        assert lengths[torch.cat(batches)].diff().max() <= 0  # like lengths are together


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("mask_truncated", (False, True))
def test_micro_batches_and_order_and_recomputation_change_no_gradient(average, mask_truncated, make_model,
                                                                      random_rollout, full_logprobs):
    model, rollout = make_model(), random_rollout(rows=9)
    rollout.old_logprobs = full_logprobs(model, rollout) + 0.1 * rollout.completion_mask
    rollout.ref_logprobs = rollout.old_logprobs - 0.3
    given = dict(loss_average=average, kl_coef=0.1, mask_truncated=mask_truncated)
    whole, expected = gradient_of(model, rollout, micro_batch_tokens=10_000, **given)
    assert whole.norm() > 1e-3
    shuffled = rollout.select(torch.tensor([3, 8, 0, 2, 7, 5, 1, 6, 4]))
    for part, tokens in ((rollout, 1), (rollout, 40), (shuffled, 40), (shuffled, 10_000)):
        if tokens == 10_000:
            model.activation_checkpointing_enable({"use_reentrant": False})
        gradient, sums = gradient_of(model, part, micro_batch_tokens=tokens, **given)
        torch.testing.assert_close(gradient, whole, atol=1e-6, rtol=0)
        assert sums == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in expected.items()}


@pytest.mark.parametrize("average", AVERAGES)
def test_the_gradient_of_an_update_is_that_of_the_formula(average, make_model, plain, random_rollout, full_logprobs):
    """All rows one by one through a plain forward pass, the sum written out."""
    model, rollout = make_model(), random_rollout()
    rollout.old_logprobs = full_logprobs(model, rollout, 0.7) + 0.2 * (rollout.old_logprobs + 1)  # ratios 0.8 to 1.2
    rollout.ref_logprobs = rollout.old_logprobs - 0.3
    ours, _ = gradient_of(model, rollout, loss_average=average, kl_coef=0.1, temperature=0.7, clip_eps=0.1)
    other, rows, tokens = plain(model), len(rollout.texts), int(rollout.completion_tokens.sum())
    for b, (p, c) in enumerate(zip(rollout.prompt_tokens.tolist(), rollout.completion_tokens.tolist())):
        ids, advantage, loss = rollout.ids[b, : p + c], float(rollout.advantages[b]), 0.0
        logprobs = (other(input_ids=ids[None]).logits[0] / 0.7).log_softmax(-1)
        for t in range(c):
            logprob = logprobs[p + t - 1, ids[p + t]]
            ratio = (logprob - rollout.old_logprobs[b, t]).exp()
            distance = rollout.ref_logprobs[b, t] - logprob
            surrogate = torch.min(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
            loss = loss - surrogate + 0.1 * (distance.exp() - distance - 1)
        (loss / {"sequence": rows * c, "token": tokens, "constant": rows * 12}[average]).backward()
    theirs = torch.cat([weight.grad.flatten() for weight in other.parameters()])
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
    assert theirs.norm() > 1e-2


def test_masked_truncated_completions_have_no_part_in_an_update(make_model, random_rollout):
    model, rollout = make_model(), random_rollout()  # of which only the last is truncated
    masked, unmasked = (gradient_of(model, rollout, mask_truncated=mask)[0] for mask in (True, False))
    without, _ = gradient_of(model, rollout.select(torch.arange(5)))
    torch.testing.assert_close(masked, without, atol=1e-6, rtol=0)
    assert (masked - unmasked).norm() > 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_flat_groups_teach_nothing_but_the_way_back_to_the_reference(dtype, make_model, random_rollout):
    model, rollout = make_model(dtype=dtype), random_rollout()
    rollout.advantages = grpo.group_advantages(torch.full((2, 3), 0.1)).flatten()
    before = weights_of(model)
    sums = update_policy(model, MasterAdamW(model, 1e-2), rollout, settings(), 1e-2)
    assert sums["grad_norm"] == 0 and sums["loss"] == 0 and same(before, weights_of(model))
    rollout.ref_logprobs = rollout.old_logprobs
    assert update_policy(model, MasterAdamW(model, 1e-2), rollout, settings(kl_coef=0.1), 1e-2)["grad_norm"] > 0


@pytest.mark.parametrize("temperature", (1, 0.7))
def test_the_ratio_is_one_in_the_first_update_and_not_later(temperature, make_model, tokenizer):
    model = make_model()
    rollout = sample_completions(model, tokenizer, ["User: 3 + 4", "x"], group_size=4, max_completion_tokens=12,
                                 temperature=temperature)
    rollout.old_logprobs, rollout.advantages = rollout.sample_logprobs, torch.tensor([1.0, -1] * 4)
    optimizer, cfg = MasterAdamW(model, 1e-2), settings(temperature=temperature)
    first, later = (update_policy(model, optimizer, rollout, cfg, 1e-2) for _ in range(2))
    assert first["ratio"] == pytest.approx(1, abs=1e-5)
    assert first["sampler_gap"] < 1e-5 and first["clipped"] == 0
    assert later["sampler_gap"] > 1e-3 and later["clipped"] > 0 and later["loss"] < first["loss"]


# --- the loop

PROBLEMS = [Problem("What is 3 + 4?", "7"), Problem("What is 4 + 4?", "8"), Problem("3", "3")]


@pytest.fixture
def small_ids_are_good(monkeypatch):
    """The reward is a rule that a random model can learn in no time: small ids."""

    def score(rollout, batch, cfg, reward_model=None):
        place = torch.arange(rollout.ids.shape[1]) - rollout.prompt_tokens[:, None]
        small = (rollout.ids < 150) & (place >= 0) & (place < rollout.completion_tokens[:, None])
        rewards = small.sum(1) / rollout.completion_tokens
        return rewards.view(len(batch), -1), {"accuracy": rewards.tolist(), "format": rewards.tolist()}, Counter()

    monkeypatch.setattr(grpo, "score", score)


def test_the_policy_learns_what_is_rewarded(make_model, tokenizer, small_ids_are_good):
    cfg = settings(steps=14, prompts_per_step=3, group_size=8, learning_rate=2e-2, micro_batch_tokens=10_000)
    steps = [metrics for metrics, *_ in train_grpo(make_model(), tokenizer, PROBLEMS, cfg)]
    rewards = [metrics["reward"] for metrics in steps]
    assert sum(rewards[:2]) / 2 < 0.6 and sum(rewards[-2:]) / 2 > 0.8, rewards
    assert [metrics["step"] for metrics in steps] == list(range(1, 15))
    assert all(math.isfinite(metrics["loss"]) and metrics["kl"] == 0 for metrics in steps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_goes_on_from_a_state_to_the_last_bit(dtype, make_model, tokenizer, small_ids_are_good):
    """Problems, samples, learning rate, moments, masters and the reference, which changes after step 3."""
    cfg, model, whole = settings(steps=5, kl_coef=0.01, ref_every=3, seed=3), make_model(dtype=dtype), []
    facts = lambda m: {name: value for name, value in m.items() if "second" not in name}
    for metrics, _, _, state in train_grpo(model, tokenizer, PROBLEMS, cfg):
        whole.append(facts(metrics))
        if metrics["step"] == 2:
            weights, saved = copy.deepcopy((model.state_dict(), state))
    resumed = make_model(dtype=dtype, spread=0.3)
    resumed.load_state_dict(weights)
    assert [facts(m) for m, *_ in train_grpo(resumed, tokenizer, PROBLEMS, cfg, saved)] == whole[2:]
    assert same(weights_of(resumed), weights_of(model)) and len(whole) == 5
    assert facts(next(train_grpo(model, tokenizer, PROBLEMS, dataclasses.replace(cfg, seed=4)))[0]) != whole[0]


@pytest.mark.parametrize("kl_coef, ref_every, refreshed", [(0.0, 0, None), (0.01, 0, []), (0.01, 2, [3]),
                                                           (0.01, 1, [2, 3])])
def test_the_reference_becomes_the_policy_when_it_is_time(kl_coef, ref_every, refreshed, make_model, tokenizer,
                                                          full_logprobs, small_ids_are_good, monkeypatch):
    model, initial = make_model(), make_model()
    model.grpo_decoder = (graph for graph in ())  # what sampling leaves on a GPU cannot be copied either
    for metrics, rollout, *_ in train_grpo(model, tokenizer, PROBLEMS, settings(kl_coef=kl_coef, ref_every=ref_every)):
        assert (rollout.ref_logprobs is None) == (refreshed is None)
        if refreshed is None:
            continue
        gap = float((rollout.ref_logprobs - rollout.old_logprobs).abs().max())
        assert (gap < 1e-4) == (metrics["step"] in [1, *refreshed]) and (metrics["kl"] > 0 or metrics["step"] == 1)
        if not refreshed:
            torch.testing.assert_close(rollout.ref_logprobs, full_logprobs(initial, rollout), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_old_logprobs_are_those_of_the_policy_that_sampled(dtype, make_model, tokenizer, small_ids_are_good):
    model = make_model(dtype=dtype)
    before = copy.deepcopy(model)
    metrics, rollout, *_ = next(train_grpo(model, tokenizer, PROBLEMS, settings(updates_per_rollout=1)))
    torch.testing.assert_close(rollout.old_logprobs, token_logprobs(before, rollout, 1.0).detach(), atol=1e-5, rtol=0)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-3 if dtype == torch.bfloat16 else 1e-6)


def test_warm_up_is_linear(make_model, tokenizer, small_ids_are_good, monkeypatch):
    rates, step = [], MasterAdamW.step
    monkeypatch.setattr(MasterAdamW, "step", lambda self, rate: rates.append(rate) or step(self, rate))
    list(train_grpo(make_model(), tokenizer, PROBLEMS, settings(steps=7, learning_rate=1e-3)))
    assert rates == pytest.approx([1e-3 * share for share in (0.2, 0.4, 0.6, 0.8, 1, 1, 1) for _ in range(2)])


def test_metrics_of_given_rewards(make_model, tokenizer, monkeypatch):
    rewards = torch.tensor([[2.0, 2, 2, 2], [0, 2, 1, 0]])
    parts = dict(accuracy=[1.0] * 6 + [0.0] * 2, format=[0.5] * 8, preference=[None] * 7 + [0.25])
    monkeypatch.setattr(grpo, "score", lambda *_: (rewards, parts, Counter(right=6)))
    m, rollout, batch, state = next(train_grpo(make_model(), tokenizer, PROBLEMS, settings()))
    assert (m["reward"], m["accuracy"], m["format"], m["preference"]) == (1.375, 0.75, 0.5, 0.25)
    assert (m["flat_groups"], m["outcomes"], state["step"], len(batch)) == (0.5, {"right": 6}, 1, 2)
    assert m["mean_tokens"] == pytest.approx(rollout.completion_tokens.float().mean().item())
    assert m["truncated"] == rollout.truncated.float().mean().item() and 0 < m["entropy"] < math.log(320)
    torch.testing.assert_close(rollout.advantages, grpo.group_advantages(rewards).flatten())


def test_in_its_last_steps_every_second_question_is_a_general_one(make_model, tokenizer):
    general, judged = [Problem(f"hello {i}", task="helpful") for i in range(3)], []
    judge = lambda rows: judged.append([problem.question for _, problem in rows]) or [1.0] * len(rows)
    cfg = settings(steps=4, preference_steps=2, prompts_per_step=4, general_data="x", reward_model="x")
    batches = [batch for _, _, batch, _ in train_grpo(make_model(), tokenizer, PROBLEMS, cfg, None, general, judge)]
    assert [[p.task == "helpful" for p in batch] for batch in batches] == [[False] * 4] * 2 + [[True, False] * 2] * 2
    assert judged == [[p.question for p in batch[::2] for _ in range(4)] for batch in batches[2:]]


def test_steps_without_a_finite_gradient_are_left_out(make_model, tokenizer, monkeypatch):
    model, bad, seen = make_model(), [2, 4, 5, 6], []
    before, rewards = weights_of(model), torch.tensor([[1.0, 0, 0, 1]] * 2)
    monkeypatch.setattr(grpo, "score", lambda *_: (
        rewards * (math.nan if len(seen) + 1 in bad else 1), dict(accuracy=[1.0], format=[1.0]), Counter()))
    for metrics, *_ in train_grpo(model, tokenizer, PROBLEMS, settings(steps=9)):
        seen.append(math.isfinite(metrics["grad_norm"]))
    assert [step for step, finite in enumerate(seen, 1) if not finite] == bad
    assert all(weight.isfinite().all() for weight in model.parameters()) and not same(before, weights_of(model))


def test_an_epoch_takes_every_problem_once_in_an_order_of_its_own():
    problems, cfg = [Problem(str(i)) for i in range(10)], settings(prompts_per_step=4)
    asked = [p.question for step in range(1, 6) for p in grpo.batch_of_problems(problems, step, cfg)]
    assert sorted(asked[:10]) == sorted(asked[10:]) == sorted(p.question for p in problems)
    assert asked[:10] != asked[10:] and asked[:10] != [p.question for p in problems]
    assert asked[8:12] == [p.question for p in grpo.batch_of_problems(problems, 3, cfg)]
