"""Optimiser and update. Oracles: torch's AdamW in float32, sums in float32 and float64, one big batch instead of many
small ones, and what must be equal to the last bit."""

import copy
import dataclasses
import math
import threading
from collections import Counter

import pytest
import torch

import grpo
from grpo import (
    MasterAdamW,
    Problem,
    make_config,
    sample_completions,
    token_logprobs,
    train_grpo,
    update_policy,
)


class Weights(torch.nn.Module):
    """Parameters and nothing else."""

    def __init__(self, *values, dtype=torch.float32):
        super().__init__()
        self.values = torch.nn.ParameterList(torch.tensor(value, dtype=dtype) for value in values)
        self.device = torch.device("cpu")


def settings(**overrides):
    return make_config(
        **{
            **dict(
                model="x",
                prompts_per_step=2,
                group_size=4,
                max_completion_tokens=12,
                kl_coef=0.0,
                warmup_steps=0,
                steps=3,
                learning_rate=1e-2,
                gradient_checkpointing=False,
                max_rows=8,
                micro_batch_tokens=64,
                logits_chunk_tokens=16,
            ),
            **overrides,
        }
    )


def weights_of(model):
    return [weight.detach().clone() for weight in model.parameters()]


def same(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Keep:
    """An optimizer that only looks at the gradient."""

    moved = 0.0

    def __init__(self, model):
        self.model = model

    def accumulate(self):
        """The gradients of float32 weights add up by themselves."""

    def step(self, *_):
        self.gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        self.model.zero_grad()
        return 0.0


# --- master weights


@pytest.mark.parametrize("weight, smallest", [(0.1, 1e-3), (0.02, 1e-4), (0.001, 1e-5), (0.0002, 1e-6)])
def test_bfloat16_swallows_small_steps_and_the_master_does_not(weight, smallest):
    for learning_rate in (1e-7, 1e-6, 3e-6, 1e-5, 1e-4, 1e-3):
        model = Weights([weight], dtype=torch.bfloat16)
        optimizer, before = MasterAdamW(model, learning_rate), model.values[0].item()
        model.values[0].sum().backward()
        optimizer.step(learning_rate, 1.0)
        assert (model.values[0].item() != before) == (learning_rate >= smallest)
        assert before - optimizer.masters[0].item() == pytest.approx(learning_rate, rel=1e-2, abs=1e-8)


def test_small_steps_add_up_under_bfloat16_weights(make_model, random_rollout):
    model = make_model(spread=0.0, dtype=torch.bfloat16)
    naive = copy.deepcopy(model)
    optimizer, plain_adamw = (
        MasterAdamW(model, 1e-6),
        torch.optim.AdamW(naive.parameters(), lr=1e-6, weight_decay=0.0),
    )
    masters, before = [m.clone() for m in optimizer.masters], weights_of(naive)
    rollout, cfg = random_rollout(), settings()
    for _ in range(10):
        update_policy(model, optimizer, rollout, cfg, 1e-6)
        token_logprobs(naive, rollout, 1.0).mean().backward()
        plain_adamw.step()
        plain_adamw.zero_grad()
    share = lambda old, new: (
        sum((a != b).sum().item() for a, b in zip(old, new)) / sum(a.numel() for a in old)
    )
    assert share(masters, optimizer.masters) > 0.9
    assert share(before, weights_of(naive)) < 0.05
    assert all(
        torch.equal(weight, master.bfloat16())
        for weight, master in zip(model.parameters(), optimizer.masters)
    )


def test_the_share_of_weights_that_moved_is_what_survives_rounding():
    model = Weights([0.02, 0.0002], dtype=torch.bfloat16)
    optimizer = MasterAdamW(model, 1e-6)
    sum(value.sum() for value in model.values).backward()
    optimizer.step(1e-6, 10.0)
    assert optimizer.moved == 0.5


def test_many_small_steps_move_a_bfloat16_weight():
    model = Weights([0.02], dtype=torch.bfloat16)
    optimizer, before = MasterAdamW(model, 1e-6), model.values[0].item()
    for _ in range(200):
        model.values[0].sum().backward()
        optimizer.step(1e-6, 1.0)
    assert before - model.values[0].item() == pytest.approx(2e-4, rel=0.3)


def test_gradients_of_micro_batches_are_added_in_float32():
    model = Weights([0.5, 0.5], dtype=torch.bfloat16)
    optimizer, weight = MasterAdamW(model, 1e-3), model.values[0]
    for scale in [1.0] + [2.0**-10] * 512:  # in bfloat16 each of the small ones is lost
        (scale * weight * torch.tensor([1.0, -2.0], dtype=torch.bfloat16)).sum().backward()
        optimizer.accumulate()
        assert weight.grad is None
    assert optimizer.masters[0].grad.tolist() == [1.5, -3.0]
    assert optimizer.step(1e-3, 1.0) == pytest.approx(math.hypot(1.5, 3.0))


def test_in_float32_it_is_torchs_adamw(make_model, random_rollout):
    model = make_model()
    other = copy.deepcopy(model)
    ours = MasterAdamW(model, 1e-3)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    assert all(master is weight for master, weight in zip(ours.masters, model.parameters()))
    for step in range(5):
        learning_rate = 1e-3 / (step + 1)
        for m in (model, other):
            (3 * token_logprobs(m, random_rollout(seed=step), 1.0).sum()).backward()
        norm = ours.step(learning_rate, 0.5)
        assert norm == float(torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)) and norm > 0.5
        theirs.param_groups[0]["lr"] = learning_rate
        theirs.step()
        theirs.zero_grad()
    torch.testing.assert_close(weights_of(model), weights_of(other), atol=1e-7, rtol=0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_a_gradient_that_is_not_finite_changes_no_bit(dtype, bad):
    model = Weights([0.1, 0.2], [0.3], dtype=dtype)
    optimizer = MasterAdamW(model, 1e-3)
    sum(value.sum() for value in model.values).backward()
    optimizer.step(1e-3, 1.0)
    moments = lambda: [t.clone() for s in optimizer.adamw.state.values() for t in s.values()]
    before = weights_of(model) + [m.clone() for m in optimizer.masters] + moments()
    (model.values[0].sum() * bad + model.values[1].sum()).backward()
    assert not math.isfinite(optimizer.step(1e-3, 1.0))
    assert same(before, weights_of(model) + list(optimizer.masters) + moments())
    sum(value.sum() for value in model.values).backward()  # and the bad gradient is forgotten
    assert math.isfinite(optimizer.step(1e-3, 1.0))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_its_state_goes_on_where_it_was(dtype):
    def run(optimizer, model, steps):
        for step in steps:
            (model.values[0] * (step + 1.0)).sum().backward()
            optimizer.step(1e-4, 10.0)

    whole, part = Weights([0.1, -0.2], dtype=dtype), Weights([0.1, -0.2], dtype=dtype)
    run(MasterAdamW(whole, 1e-4), whole, range(6))
    first = MasterAdamW(part, 1e-4)
    run(first, part, range(3))
    state, resumed = copy.deepcopy(first.state_dict()), Weights([9.0, 9.0], dtype=dtype)
    resumed.load_state_dict(part.state_dict())
    second = MasterAdamW(resumed, 1e-4)
    second.load_state_dict(state)
    run(second, resumed, range(3, 6))
    assert same(weights_of(whole), weights_of(resumed))


def test_a_second_optimiser_takes_over(make_model, random_rollout):
    model = make_model(dtype=torch.bfloat16)
    MasterAdamW(model, 1e-3)
    optimizer, before = MasterAdamW(model, 1e-3), weights_of(model)
    sums = update_policy(model, optimizer, random_rollout(), settings(), 1e-3)
    assert sums["grad_norm"] > 0 and not same(before, weights_of(model))


# --- one update


def test_micro_batches_hold_every_row_once_and_no_more_tokens_than_allowed(random_rollout):
    rollout = random_rollout(rows=40)
    lengths = rollout.prompt_tokens + rollout.completion_tokens
    for max_tokens in (1, 20, 50, 10_000):
        batches = grpo.micro_batches(rollout, max_tokens)
        assert sorted(torch.cat(batches).tolist()) == list(range(40))
        assert all(len(rows) == 1 or len(rows) * lengths[rows].max() <= max_tokens for rows in batches)
        assert len(batches) == 40 if max_tokens == 1 else len(batches) < 40
        tops = [int(lengths[rows].max()) for rows in batches]
        assert tops == sorted(tops, reverse=True)  # like lengths are together


@pytest.mark.parametrize("average", ("sequence", "token", "constant"))
@pytest.mark.parametrize("mask_truncated", (False, True))
def test_micro_batch_size_and_order_change_no_gradient(
    average, mask_truncated, make_model, random_rollout, full_logprobs
):
    model, rollout = make_model(), random_rollout(rows=9)
    rollout.old_logprobs = full_logprobs(model, rollout) + 0.1 * rollout.completion_mask
    rollout.ref_logprobs = rollout.old_logprobs - 0.3
    cfg = settings(loss_average=average, kl_coef=0.1, mask_truncated=mask_truncated)
    results = []
    for max_tokens, order in (
        (10_000, range(9)),
        (1, range(9)),
        (40, range(9)),
        (40, [3, 8, 0, 2, 7, 5, 1, 6, 4]),
    ):
        keep = Keep(model)
        sums = update_policy(
            model,
            keep,
            rollout.select(torch.tensor(order)),
            dataclasses.replace(cfg, micro_batch_tokens=max_tokens),
            1e-3,
        )
        results.append((keep.gradient, sums))
    assert results[0][0].norm() > 1e-3
    for gradient, sums in results[1:]:
        torch.testing.assert_close(gradient, results[0][0], atol=1e-6, rtol=0)
        for name, value in sums.items():
            assert value == pytest.approx(results[0][1][name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("average", ("sequence", "token", "constant"))
def test_the_gradient_of_an_update_is_that_of_the_formula(
    average, make_model, plain, random_rollout, full_logprobs
):
    """All rows one by one through a plain forward pass, the sum written out."""
    model, rollout = make_model(), random_rollout()
    rollout.old_logprobs = full_logprobs(model, rollout, 0.7) + 0.2 * rollout.old_logprobs.add(
        1
    )  # ratios 0.8 to 1.2
    rollout.ref_logprobs = rollout.old_logprobs - 0.3
    cfg = settings(loss_average=average, kl_coef=0.1, temperature=0.7, clip_eps=0.1)
    keep, other = Keep(model), plain(model)
    update_policy(model, keep, rollout, cfg, 1e-3)
    rows, tokens = len(rollout.texts), int(rollout.completion_tokens.sum())
    for b, (p, c) in enumerate(zip(rollout.prompt_tokens.tolist(), rollout.completion_tokens.tolist())):
        ids, advantage = rollout.ids[b, : p + c], float(rollout.advantages[b])
        logprobs = (other(input_ids=ids[None]).logits[0] / 0.7).log_softmax(-1)
        loss = 0.0
        for t in range(c):
            logprob = logprobs[p + t - 1, ids[p + t]]
            ratio = (logprob - rollout.old_logprobs[b, t]).exp()
            distance = rollout.ref_logprobs[b, t] - logprob
            surrogate = torch.min(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
            loss = loss - surrogate + 0.1 * (distance.exp() - distance - 1)
        (
            loss
            / {"sequence": rows * c, "token": tokens, "constant": rows * cfg.max_completion_tokens}[average]
        ).backward()
    expected = torch.cat([weight.grad.flatten() for weight in other.parameters()])
    torch.testing.assert_close(keep.gradient, expected, atol=2e-6, rtol=0)
    assert expected.norm() > 1e-2


def test_masked_truncated_completions_have_no_part_in_an_update(make_model, random_rollout):
    model, rollout = make_model(), random_rollout()
    gradients = []
    for part, masked in ((rollout, True), (rollout.select(torch.arange(5)), False), (rollout, False)):
        keep = Keep(model)
        update_policy(model, keep, part, settings(mask_truncated=masked), 1e-3)
        gradients.append(keep.gradient)
    assert rollout.truncated.tolist() == [False] * 5 + [True]
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=0)
    assert (gradients[0] - gradients[2]).norm() > 1e-3


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_flat_groups_without_kl_leave_every_weight_as_it_was(dtype, make_model, random_rollout):
    model, rollout = make_model(dtype=dtype), random_rollout()
    rollout.advantages = grpo.group_advantages(torch.full((2, 3), 0.1)).flatten()
    before = weights_of(model)
    sums = update_policy(model, MasterAdamW(model, 1e-2), rollout, settings(), 1e-2)
    assert sums["grad_norm"] == 0 and sums["loss"] == 0 and same(before, weights_of(model))


def test_flat_groups_with_kl_are_still_drawn_to_the_reference(make_model, random_rollout):
    model, rollout = make_model(), random_rollout()
    rollout.advantages = torch.zeros(6)
    rollout.ref_logprobs = rollout.old_logprobs
    assert (
        update_policy(model, MasterAdamW(model, 1e-2), rollout, settings(kl_coef=0.1), 1e-2)["grad_norm"] > 0
    )


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_the_ratio_is_one_in_the_first_update_and_not_later(temperature, make_model, tokenizer):
    model, cfg = make_model(), settings(temperature=temperature)
    rollout = sample_completions(
        model,
        tokenizer,
        ["User: 3 + 4", "x"],
        group_size=4,
        max_completion_tokens=12,
        temperature=temperature,
    )
    rollout.old_logprobs, rollout.advantages = rollout.sample_logprobs, torch.tensor([1.0, -1] * 4)
    optimizer = MasterAdamW(model, 1e-2)
    first, later = (update_policy(model, optimizer, rollout, cfg, 1e-2) for _ in range(2))
    assert first["ratio"] / first["tokens"] == pytest.approx(1, abs=1e-5)
    assert first["sampler_gap"] / first["all_tokens"] < 1e-5 and first["clipped"] == 0
    assert later["sampler_gap"] / later["all_tokens"] > 1e-3 and later["clipped"] > 0
    assert later["loss"] < first["loss"]


def test_gradient_checkpointing_changes_no_gradient(make_model, random_rollout):
    gradients = []
    for checkpointing in (False, True):
        model = make_model()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        keep = Keep(model)
        update_policy(model, keep, random_rollout(), settings(), 1e-3)
        gradients.append(keep.gradient)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)


# --- the loop

PROBLEMS = [Problem("What is 3 + 4?", "7"), Problem("What is 4 + 4?", "8"), Problem("3", "3")]


@pytest.fixture
def small_ids_are_good(monkeypatch):
    """The reward is a rule that a random model can learn in no time: small ids."""

    def score(rollout, batch, cfg, reward_model=None):
        completion = (rollout.ids < 150) & (
            torch.arange(rollout.ids.shape[1]) >= rollout.prompt_tokens[:, None]
        )
        inside = (
            torch.arange(rollout.ids.shape[1]) < (rollout.prompt_tokens + rollout.completion_tokens)[:, None]
        )
        rewards = (completion & inside).sum(1) / rollout.completion_tokens
        return (
            rewards.view(len(batch), -1),
            {"accuracy": rewards.tolist(), "format": rewards.tolist()},
            Counter(),
        )

    monkeypatch.setattr(grpo, "score", score)


def steps_of(model, tokenizer, cfg, problems=PROBLEMS):
    """What `train_grpo` reports, step by step."""
    steps = []
    train_grpo(
        model,
        tokenizer,
        problems,
        cfg,
        lambda metrics, rollout, *_: steps.append((metrics, rollout)) and None,
    )
    return steps


def test_the_policy_learns_what_is_rewarded(make_model, tokenizer, small_ids_are_good):
    cfg = settings(
        steps=12,
        prompts_per_step=3,
        group_size=8,
        learning_rate=2e-2,
        max_rows=None,
        micro_batch_tokens=10_000,
    )
    steps = steps_of(make_model(), tokenizer, cfg)
    rewards = [metrics["reward"] for metrics, _ in steps]
    assert sum(rewards[:2]) / 2 < 0.6 and sum(rewards[-2:]) / 2 > 0.8, rewards
    assert [metrics["step"] for metrics, _ in steps] == list(range(1, 13))
    assert all(math.isfinite(metrics["loss"]) and metrics["kl"] == 0 for metrics, _ in steps)


def test_two_runs_with_a_seed_are_equal(make_model, tokenizer, small_ids_are_good):
    runs = [
        [
            (m["reward"], m["loss"], m["grad_norm"])
            for m, _ in steps_of(make_model(), tokenizer, settings(seed=seed, steps=2), PROBLEMS[:1])
        ]
        for seed in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_without_kl_there_is_no_reference(make_model, tokenizer, small_ids_are_good):
    assert all(rollout.ref_logprobs is None for _, rollout in steps_of(make_model(), tokenizer, settings()))


@pytest.mark.parametrize("ref_every, refreshed", [(0, []), (2, [3]), (1, [2, 3])])
def test_the_reference_becomes_the_policy_when_it_is_time(
    ref_every, refreshed, make_model, tokenizer, small_ids_are_good
):
    steps = steps_of(make_model(), tokenizer, settings(kl_coef=0.01, ref_every=ref_every))
    for metrics, rollout in steps:
        gap = float((rollout.ref_logprobs - rollout.old_logprobs).abs().max())
        assert (gap < 1e-4) == (metrics["step"] in [1, *refreshed])


def test_the_reference_is_no_part_of_the_policy(make_model, tokenizer, small_ids_are_good, full_logprobs):
    model = make_model()
    initial = copy.deepcopy(model)
    _, rollout = steps_of(model, tokenizer, settings(kl_coef=0.01))[-1]
    torch.testing.assert_close(rollout.ref_logprobs, full_logprobs(initial, rollout), atol=1e-5, rtol=0)


def test_reference_is_not_a_copy_of_the_samplers_state(make_model, tokenizer, small_ids_are_good):
    model = make_model()
    sample_completions(model, tokenizer, ["x"], group_size=8, max_completion_tokens=12)
    model.grpo_decoder.graphs["as a CUDA graph"] = threading.Lock()  # cannot be copied either
    assert len(steps_of(model, tokenizer, settings(kl_coef=0.01, steps=1))) == 1


def test_an_epoch_takes_every_problem_once_in_an_order_of_its_own():
    problems = [Problem(str(i)) for i in range(10)]
    cfg = settings(prompts_per_step=4)
    asked = [p.question for step in range(1, 6) for p in grpo.batch_of_problems(problems, step, cfg)]
    assert sorted(asked[:10]) == sorted(asked[10:]) == sorted(p.question for p in problems)
    assert asked[:10] != asked[10:] and asked[:10] != [p.question for p in problems]
    assert asked[8:12] == [p.question for p in grpo.batch_of_problems(problems, 3, cfg)]
