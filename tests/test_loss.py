"""Advantages and loss. Oracles: numbers worked out by hand (and confirmed with another implementation) to six digits,
slow loops in float64, and what must not depend on order, padding or the size of a micro-batch."""

import math

import pytest
import torch

from grpo import group_advantages, grpo_loss, loss_weights

AVERAGES = ("sequence", "token", "constant")


def close(actual, expected, atol=2e-6):
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def loss_and_gradient(logprobs, old, ref, advantages, mask, average="sequence", longest=0, **settings):
    logprobs = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(mask, dtype=torch.bool)
    old, ref = (None if values is None else torch.tensor(values, dtype=torch.float64) for values in (old, ref))
    weights = loss_weights(mask, average, longest)
    loss, stats = grpo_loss(logprobs, old, ref, torch.tensor(advantages), mask, weights, **settings)
    loss.backward()
    return loss.item(), logprobs.grad, stats


def one_token(logprob, old, ref, advantage, **settings):
    return loss_and_gradient([[logprob]], [[old]], [[ref]], [float(advantage)], [[1]], **settings)


def random_case(rows=7, width=9):
    draw = torch.Generator().manual_seed(0)
    old = -2 * torch.rand(rows, width, generator=draw)
    logprobs, ref = (old + 0.5 * torch.randn(rows, width, generator=draw) for _ in range(2))
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=draw)
    return dict(logprobs=logprobs.requires_grad_(), old_logprobs=old, ref_logprobs=ref,
                advantages=torch.randn(rows, generator=draw), completion_mask=mask)


# --- advantages


def test_advantages_by_hand():
    close(group_advantages(torch.tensor([[1.0, 0, 0, 1]])), [[0.999800, -0.999800, -0.999800, 0.999800]])
    close(group_advantages(torch.tensor([[1.0, 0, 0, 1]]), scale=False), [[0.5, -0.5, -0.5, 0.5]])
    close(group_advantages(torch.tensor([[1, 0, 0, 1]])), [[0.999800, -0.999800, -0.999800, 0.999800]])  # integers
    close(group_advantages(torch.tensor([[2, 1, 0, 0, 1, 1.1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]])),
          [[1.936604, 0.515243, -0.906117, -0.906117, 0.515243, 0.657379, -0.906117, -0.906117],
           [2.644952] + 7 * [-0.377850]])


@pytest.mark.parametrize("right, good, bad", [
    (1, 2.645751, -0.377964), (2, 1.732051, -0.577350), (4, 1, -1), (6, 0.577350, -1.732051)])
def test_rare_successes_weigh_more(right, good, bad):
    advantages = group_advantages(torch.tensor([[1.0] * right + [0.0] * (8 - right)]))
    close(advantages, [[good] * right + [bad] * (8 - right)], atol=1e-3)


@pytest.mark.parametrize("reward", (0.0, 0.1, 1.0, 1.1, 1e4))
@pytest.mark.parametrize("scale", (True, False))
def test_a_flat_group_is_exactly_zero_in_float32(reward, scale):
    advantages = group_advantages(torch.tensor([[reward] * 8, [reward, reward + 1] * 4]), scale)
    assert advantages[0].tolist() == [0.0] * 8
    assert (advantages[1] != 0).all()


@pytest.mark.parametrize("scale", (True, False))
def test_advantages_equal_a_slow_loop_and_sum_to_zero(scale):
    rewards = torch.rand(5, 6, generator=torch.Generator().manual_seed(1))
    expected = []
    for group in rewards.tolist():
        mean = sum(group) / 6
        deviation = (sum((r - mean) ** 2 for r in group) / 6) ** 0.5
        expected.append([(r - mean) / (deviation + 1e-4 if scale else 1) for r in group])
    close(group_advantages(rewards, scale), expected)
    close(group_advantages(rewards, scale).sum(1), [0.0] * 5)


# --- averaging over tokens and completions


@pytest.mark.parametrize("average, loss, first, second", [
    ("sequence", 0.0, 0.125, -0.5), ("token", 0.6, 0.2, -0.2), ("constant", 0.1875, 0.0625, -0.0625)])
def test_on_policy_loss_and_gradient_of_each_average(average, loss, first, second):
    logprobs, mask = [[-1.0, -2, -0.5, -3], [-0.7, -9, -9, -9]], [[1, 1, 1, 1], [1, 0, 0, 0]]
    value, gradient, _ = loss_and_gradient(logprobs, logprobs, None, [-1.0, 1.0], mask, average, 8)
    close(value, loss)
    close(gradient, [[first] * 4, [second, 0, 0, 0]])


@pytest.mark.parametrize("average, rows, expected", [
    ("token", 2, 1.6), ("sequence", 2, 2.5), ("constant", 2, 0.5), ("sequence", 3, 2.333333), ("token", 3, 1.714286)])
def test_the_average_of_given_losses(average, rows, expected):
    losses = torch.tensor([[1.0, 1, 1, 1], [4, 0, 0, 0], [2, 2, 0, 0]])[:rows]
    close((loss_weights(losses != 0, average, 8) * losses).sum(), expected)


def test_completions_without_any_token_do_not_count():
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    close(loss_weights(mask, "sequence"), [[0.25, 0.25], [0, 0], [0.5, 0]])
    close(loss_weights(mask, "token"), [[1 / 3, 1 / 3], [0, 0], [1 / 3, 0]])
    close(loss_weights(mask, "constant", 4), [[0.125, 0.125], [0, 0], [0.125, 0]])


@pytest.mark.parametrize("average", AVERAGES)
def test_an_empty_mask_gives_no_loss_and_no_nan(average):
    case = random_case()
    mask = case["completion_mask"] = torch.zeros_like(case["completion_mask"])
    loss, _ = grpo_loss(**case, weights=loss_weights(mask, average, 9), kl_coef=0.1)
    loss.backward()
    assert loss.item() == 0 and not case["logprobs"].grad.any()


# --- ratio, clip and KL

WORKED = dict(
    logprobs=[[-1, -0.5, -2], [-0.2, -1.2, -0.7]], old=[[-1.1, -0.8, -1.9], [-0.2, -0.8, -0.3]],
    ref=[[-1.3, -0.5, -1.5], [-0.4, -1, -0.7]], mask=[[1, 1, 1], [1, 1, 0]], advantages=[1.0, -1.0])


@pytest.mark.parametrize("settings, losses", [
    (dict(), (-0.085001, -0.282002, -0.141001)), (dict(kl_coef=0.04), (-0.083336, -0.280164, -0.140082)),
    (dict(clip_eps_high=0.28), (-0.098335, -0.298002, -0.149001))])
def test_worked_example_loss(settings, losses):
    for average, expected in zip(AVERAGES, losses):
        close(loss_and_gradient(**WORKED, average=average, longest=5, **settings)[0], expected)


@pytest.mark.parametrize("average, kl_coef, expected", [
    ("sequence", 0, [[-0.184195, 0, -0.150806], [0.25, 0, 0]]),
    ("sequence", 0.04, [[-0.182467, 0, -0.155131], [0.251813, -0.002214, 0]]),
    ("token", 0, [[-0.221034, 0, -0.180967], [0.2, 0, 0]]),
    ("constant", 0, [[-0.110517, 0, -0.090484], [0.1, 0, 0]])])
def test_worked_example_gradient(average, kl_coef, expected):
    close(loss_and_gradient(**WORKED, average=average, longest=5, kl_coef=kl_coef)[1], expected)


def test_worked_example_sums():
    stats = loss_and_gradient(**WORKED, kl_coef=0.04)[2]
    assert (stats["tokens"], stats["clipped"]) == (5, 2)
    close(stats["kl"], 0.040818 + 0 + 0.148721 + 0.018731 + 0.021403)
    close(stats["ratio"], 1.105171 + 1.349859 + 0.904837 + 1 + 0.670320)


def test_weights_default_to_the_mean_per_completion():
    case = random_case()
    close(grpo_loss(**case)[0].item(), grpo_loss(**case, weights=loss_weights(case["completion_mask"]))[0].item(), 0)


@pytest.mark.parametrize("ratio, advantage, objective, gradient, settings", [
    (0.5, 1, 0.5, 0.5, {}), (0.5, -1, -0.8, 0, {}), (0.79, 1, 0.79, 0.79, {}), (0.79, -1, -0.8, 0, {}),
    (0.9, 1, 0.9, 0.9, {}), (0.9, -1, -0.9, -0.9, {}), (1, 1, 1, 1, {}), (1, -1, -1, -1, {}), (1.1, 1, 1.1, 1.1, {}),
    (1.1, -1, -1.1, -1.1, {}), (1.25, 1, 1.2, 0, {}), (1.25, -1, -1.25, -1.25, {}), (1.3, 1, 1.2, 0, {}),
    (1.3, -1, -1.3, -1.3, {}), (4, 1, 1.2, 0, {}), (4, -1, -4, -4, {}),
    (1.25, 1, 1.25, 1.25, dict(clip_eps_high=0.28)), (1.3, 1, 1.28, 0, dict(clip_eps_high=0.28)),
    (0.75, -1, -0.8, 0, dict(clip_eps_high=0.28)), (1.01, 1, 1, 0, dict(clip_eps_high=0.0)),
    (12, 1, 11, 0, dict(clip_eps=10)), (0.001, -1, -0.001, -0.001, dict(clip_eps=10))])
def test_clip_truth_table(ratio, advantage, objective, gradient, settings):
    loss, actual, stats = one_token(math.log(ratio), 0.0, 0.0, advantage, **settings)
    close(-loss, objective, 1e-5)
    close(-actual, [[gradient]], 1e-5)
    assert stats["clipped"] == (gradient == 0)


@pytest.mark.parametrize("policy, reference, value, gradient", [
    (0.5, 0.25, 0.193147, 0.5), (0.25, 0.5, 0.306853, -1), (0.3, 0.3, 0, 0)])
def test_kl_estimate_and_its_gradient(policy, reference, value, gradient):
    logprob, ref = math.log(policy), math.log(reference)
    loss, actual, stats = one_token(logprob, logprob, ref, 0, kl_coef=1.0)
    close(loss, value)
    close(actual, [[gradient]])
    close(stats["kl"], value)


def test_kl_estimate_is_never_negative():
    case = random_case(200)
    case["advantages"] = torch.zeros(200)
    for b in range(200):
        assert grpo_loss(**{name: value[b : b + 1] for name, value in case.items()}, kl_coef=1.0)[0] >= 0


def test_expected_gradient_of_the_kl_term_is_that_of_the_forward_kl():
    logits = torch.tensor([4.0, 1.0]).log().requires_grad_()  # π = (.8, .2), reference (.5, .5)
    logprobs, ref = logits.log_softmax(-1)[None], torch.full((1, 2), 0.5).log()
    loss, _ = grpo_loss(logprobs, logprobs.detach(), ref, torch.zeros(1), torch.ones(1, 2, dtype=torch.bool),
                        weights=logprobs.detach().exp(), kl_coef=1.0)
    loss.backward()
    close(loss.item(), 0.192745)  # its value is the reverse KL's
    close(logits.grad, [0.3, -0.3])


def test_without_kl_the_reference_has_no_part():
    case = random_case()
    garbage = {**case, "ref_logprobs": torch.full_like(case["logprobs"], float("nan"))}
    assert grpo_loss(**{**case, "ref_logprobs": None})[0] == grpo_loss(**garbage)[0]


def test_what_makes_no_sense_is_refused():
    case = random_case()
    with pytest.raises(TypeError):
        grpo_loss(**{**case, "ref_logprobs": None}, kl_coef=0.1)
    with pytest.raises(TypeError):
        grpo_loss(**{**case, "completion_mask": case["completion_mask"].float()})
    with pytest.raises(ValueError, match="max_completion_tokens"):
        loss_weights(case["completion_mask"], "constant")


# --- numbers that overflow


@pytest.mark.parametrize("padding", (-200.0, -1e30, float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("where", ("logprobs", "old_logprobs", "ref_logprobs"))
def test_garbage_in_padding_reaches_neither_loss_nor_gradient(where, padding):
    case = random_case()
    expected, outside = grpo_loss(**case, kl_coef=0.1)[0], ~case["completion_mask"]
    case[where] = case[where].detach().masked_fill(outside, padding)
    logprobs = case["logprobs"] = case["logprobs"].detach().requires_grad_()
    loss, stats = grpo_loss(**case, kl_coef=0.1)
    loss.backward()
    assert loss == expected and all(math.isfinite(value) for value in stats.values())
    assert logprobs.grad.isfinite().all() and not logprobs.grad[outside].any()


@pytest.mark.parametrize("advantage", (1, -1))
@pytest.mark.parametrize("logprob, other", [(-200.0, 0.0), (0.0, -200.0), (-90.0, -1.0)])
def test_far_policies_give_finite_loss_and_gradient(logprob, other, advantage):
    loss, gradient, _ = one_token(logprob, other, other, advantage, kl_coef=1.0)
    assert math.isfinite(loss) and gradient.isfinite().all()


def test_kl_at_the_ends_of_its_range():
    for distance, expected in ((20.0, 485165174.41), (-20.0, 19.0)):
        assert one_token(0.0, 0.0, distance, 0, kl_coef=1.0)[0] == pytest.approx(expected, rel=1e-7)


# --- what must change nothing


@pytest.mark.parametrize("average", AVERAGES)
def test_order_and_micro_batches_and_padding_change_nothing(average):
    case = random_case()

    def gradient(batches, extra=0):
        wide = {name: torch.nn.functional.pad(value.detach(), (0, extra)) if value.dim() == 2 else value
                for name, value in case.items()}
        wide["logprobs"].requires_grad_()
        weights = loss_weights(wide["completion_mask"], average, 9)
        for rows in batches:
            part = {name: value[rows] for name, value in wide.items()}
            grpo_loss(**part, weights=weights[rows], kl_coef=0.1)[0].backward()
        return wide["logprobs"].grad[:, :9]

    whole = gradient([torch.arange(7)])
    assert whole.abs().max() > 1e-3
    for batches, extra in ((torch.arange(7).split(1), 0), (torch.arange(7).split(2), 0), ([torch.randperm(7)], 0),
                           (torch.tensor([6, 1, 4, 0, 5, 3, 2]).split(3), 0), ([torch.arange(7)], 5)):
        close(gradient(batches, extra), whole, 1e-7)


def test_arguments_are_not_changed():
    case, rewards = random_case(), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    before = {name: value.detach().clone() for name, value in case.items()}
    grpo_loss(**case, weights=loss_weights(case["completion_mask"]), kl_coef=0.1)
    group_advantages(rewards)
    assert all(torch.equal(case[name], before[name]) for name in case) and rewards.tolist() == [[0, 1], [1, 1]]


# --- what a run shows


def test_on_policy_the_loss_is_zero_and_the_gradient_is_not():
    case = random_case(8)
    case["old_logprobs"] = case["logprobs"].detach().clone()
    case["advantages"] = group_advantages(torch.tensor([[1.0, 0, 0, 1], [1, 0, 0, 0]])).flatten()
    loss, stats = grpo_loss(**case)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and case["logprobs"].grad.norm() > 0.1 and stats["clipped"] == 0


def test_bandit_from_rewards_to_probabilities():
    theta, actions = torch.zeros(3, requires_grad=True), torch.tensor([2, 0, 1, 2])
    mask, advantages = torch.ones(4, 1, dtype=torch.bool), group_advantages(torch.tensor([[1, 0, 0, 1]])).flatten()
    old = theta.detach().log_softmax(-1)[actions, None]
    for step in range(2):
        loss, stats = grpo_loss(theta.log_softmax(-1)[actions, None], old, None, advantages, mask)
        (gradient,) = torch.autograd.grad(loss, theta)
        if step == 0:
            close(loss.item(), 0)
            close(gradient, [0.25, 0.25, -0.5], 1e-4)
            theta = (theta - gradient).detach().requires_grad_()
            close(theta.detach().softmax(-1), [0.242895, 0.242895, 0.514209], 1e-4)
    assert stats["clipped"] == 4 and gradient.tolist() == [0, 0, 0]
    close(stats["ratio"] / 4, (1.542628 + 0.728686) / 2, 1e-4)
    close(-loss.item(), 0.2, 1e-4)
