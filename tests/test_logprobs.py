"""Log-probabilities. Oracles: a table of logits worked out by hand, and a plain full forward pass of transformers, one
row at a time, with eager attention and all logits at once."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grpo
from grpo import grpo_loss, head_logprobs, token_logprobs

TABLE = [[2.0, 1, 0], [0, 3, 0], [1, 1, 1], [0.5, -0.5, 4]]


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(
        actual.float(), torch.as_tensor(expected, device=actual.device).float(), atol=atol, rtol=0
    )


def one_row(ids, prompt_tokens):
    completion = len(ids) - prompt_tokens
    return grpo.Rollout(
        torch.tensor([ids]),
        torch.tensor([prompt_tokens]),
        torch.tensor([completion]),
        torch.tensor([False]),
        torch.zeros(1, completion),
        [""],
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters()])


@pytest.mark.parametrize(
    "temperature, expected",
    [(1.0, [-1.407606, -0.094923, -1.098612]), (0.6, [-1.869240, -0.013386, -1.098612])],
)
def test_worked_example(temperature, expected, table_model):
    logprobs = token_logprobs(table_model(TABLE), one_row([0, 1, 1, 2], 1), temperature)
    close(logprobs, [expected], 1e-6)


@pytest.mark.parametrize(
    "logits, temperature, expected",
    [
        ([2.0, 1, 0], 1.0, 0.832396),
        ([2.0, 1, 0], 0.6, 0.556749),
        ([1.0, 1, 1], 1.0, 1.098612),
        ([1.0, 1, 1], 0.3, 1.098612),
    ],
)
def test_entropy(logits, temperature, expected):
    _, entropy = head_logprobs(lambda hidden: hidden, torch.tensor([logits]), torch.tensor([0]), temperature)
    close(entropy, [expected], 1e-6)


def test_prompt_tokens_get_no_value(table_model):
    logprobs = token_logprobs(table_model(torch.randn(5, 5)), one_row([4, 3, 2, 1, 0], 3), 1.0)
    assert logprobs.shape == (1, 2)


@pytest.mark.parametrize("temperature", (1.0, 0.7, 1.5))
def test_equals_a_plain_forward_pass(
    architecture, device_and_dtype, temperature, make_model, plain, random_rollout, full_logprobs
):
    model, rollout = make_model(architecture, *device_and_dtype), random_rollout(device=device_and_dtype[0])
    logprobs = token_logprobs(model, rollout, temperature)
    assert logprobs.dtype == torch.float32
    close(
        logprobs,
        full_logprobs(plain(model), rollout, temperature),
        1e-5 if model.dtype == torch.float32 else 0.1,
    )


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_gradient_equals_that_of_a_plain_forward_pass(
    architecture, temperature, make_model, plain, random_rollout
):
    model, rollout = make_model(architecture), random_rollout()
    other = plain(model)
    weights = torch.randn(rollout.completion_mask.shape, generator=torch.Generator().manual_seed(0)) / 10
    ours = gradients(model, (weights * token_logprobs(model, rollout, temperature)).sum())
    loss = 0.0
    for b, (p, c) in enumerate(zip(rollout.prompt_tokens.tolist(), rollout.completion_tokens.tolist())):
        ids = rollout.ids[b, : p + c]
        logprobs = (other(input_ids=ids[None]).logits[0] / temperature).log_softmax(-1)
        loss = loss + sum(weights[b, t] * logprobs[p + t - 1, ids[p + t]] for t in range(c))
    theirs = gradients(other, loss)
    assert theirs.norm() > 0.1
    close(ours, theirs, 1e-5)


def test_entropy_equals_that_of_a_plain_forward_pass(make_model, plain, random_rollout):
    model, rollout = make_model(), random_rollout()
    _, entropy = token_logprobs(model, rollout, 0.7, return_entropy=True)
    assert not entropy.requires_grad
    for b, (p, c) in enumerate(zip(rollout.prompt_tokens.tolist(), rollout.completion_tokens.tolist())):
        logits = plain(model)(input_ids=rollout.ids[b : b + 1, : p + c]).logits[0, p - 1 : -1] / 0.7
        close(entropy[b, :c], torch.distributions.Categorical(logits=logits).entropy())
        assert not entropy[b, c:].any()


def test_chunk_size_changes_neither_value_nor_gradient(make_model, random_rollout):
    model, rollout = make_model(), random_rollout()
    weights = torch.randn(rollout.completion_mask.shape, generator=torch.Generator().manual_seed(0)) / 50
    results = []
    for chunk_tokens in (10_000, 7, 1):
        logprobs = token_logprobs(model, rollout, 0.7, chunk_tokens)
        results.append((logprobs.detach(), gradients(model, (weights * logprobs).sum())))
    for logprobs, gradient in results[1:]:
        close(logprobs, results[0][0], 1e-6)
        close(gradient, results[0][1], 1e-6)


def test_garbage_in_padding_changes_nothing(make_model, random_rollout):
    model, rollout = make_model(), random_rollout()
    length = rollout.prompt_tokens + rollout.completion_tokens
    padding = torch.arange(rollout.ids.shape[1]) >= length[:, None]
    other = dataclasses.replace(
        rollout, ids=torch.where(padding, torch.randint(1, 300, padding.shape), rollout.ids)
    )
    assert padding.any() and not torch.equal(rollout.ids, other.ids)
    logprobs = token_logprobs(model, rollout, 1.0)
    close(logprobs, token_logprobs(model, other, 1.0), 1e-6)
    assert not logprobs[~rollout.completion_mask].any()


def test_neighbours_change_nothing(make_model, random_rollout):
    model, rollout = make_model(), random_rollout()
    together = token_logprobs(model, rollout, 1.0)
    for b in range(len(rollout.texts)):
        alone = token_logprobs(model, rollout.select(torch.tensor([b])), 1.0)[0]
        close(alone, together[b, : len(alone)])


def test_selected_rows_keep_what_belongs_to_them(random_rollout):
    rollout = random_rollout()
    rows = torch.tensor([3, 0])
    part = rollout.select(rows)
    assert part.texts == ["3", "0"] and part.ref_logprobs is None
    for i, b in enumerate(rows.tolist()):
        p, c = int(rollout.prompt_tokens[b]), int(rollout.completion_tokens[b])
        assert (part.prompt_tokens[i], part.completion_tokens[i]) == (p, c)
        assert torch.equal(part.ids[i, : p + c], rollout.ids[b, : p + c])
        assert torch.equal(part.old_logprobs[i, :c], rollout.old_logprobs[b, :c])
        assert part.advantages[i] == rollout.advantages[b] and part.truncated[i] == rollout.truncated[b]
    assert part.ids.shape[1] == (part.prompt_tokens + part.completion_tokens).max()
    assert part.completion_mask.shape[1] == part.completion_tokens.max()


def test_end_token_is_trained_though_it_is_the_padding_token_too(make_model, random_rollout, tokenizer):
    model, rollout = make_model(), random_rollout()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    logprobs = token_logprobs(model, rollout, 1.0)
    logprobs.retain_grad()
    loss, _ = grpo_loss(logprobs, logprobs.detach(), None, rollout.advantages, rollout.completion_mask)
    gradients(model, loss)
    rows, last = torch.arange(len(rollout.texts)), rollout.completion_tokens - 1
    assert (rollout.ids[rows, rollout.prompt_tokens + last][:-1] == tokenizer.eos_token_id).all()
    assert (logprobs[rows, last] != 0).all() and (logprobs.grad[rows, last] != 0).all()
    # A step along the gradient of one row that is only an end token makes the end token more likely.
    single = one_row([5, 6, tokenizer.eos_token_id], 2)
    before = token_logprobs(model, single, 1.0)
    gradients(model, -before.sum())
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.1 * weight.grad
    assert token_logprobs(model, single, 1.0) > before


class Sizes(TorchDispatchMode):
    """Notes the shape of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(value, torch.Tensor):
                self.shapes.add(tuple(value.shape))
        return made


def test_no_logits_beyond_one_chunk_exist_forward_or_backward(make_model, random_rollout):
    vocab, chunk_tokens = 1024, 32
    model = make_model(vocab_size=vocab, hidden_size=16, num_hidden_layers=1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    rollout = random_rollout(rows=12, longest=24)
    tokens = int(rollout.completion_tokens.sum())
    assert tokens > 3 * chunk_tokens
    kept = []  # from the forward pass for the backward pass
    with (
        Sizes() as sizes,
        torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t),
    ):
        logprobs, _ = token_logprobs(model.train(), rollout, 1.0, chunk_tokens, return_entropy=True)
        forward, sizes.shapes = sizes.shapes, set()
        logprobs.sum().backward()
    assert kept and not [shape for shape in kept if shape and shape[-1] == vocab]
    for shapes in (forward, sizes.shapes):
        rows = [torch.Size(shape).numel() // vocab for shape in shapes if shape and shape[-1] == vocab]
        assert max(rows) == chunk_tokens  # seen at all, and never more
        assert max(torch.Size(shape).numel() for shape in shapes) <= chunk_tokens * vocab
