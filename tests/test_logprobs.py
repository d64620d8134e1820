"""Log-probabilities. Oracles: a table of logits worked out by hand, and a plain full forward pass of transformers, one
row at a time, with eager attention and all logits at once."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grpo
from grpo import grpo_loss, token_logprobs


def close(actual, expected, atol=1e-5):
    expected = torch.as_tensor(expected, device=actual.device).float()
    torch.testing.assert_close(actual.float(), expected, atol=atol, rtol=0)


def one_row(ids, prompt_tokens):
    tokens = len(ids) - prompt_tokens
    return grpo.Rollout(ids=torch.tensor([ids]), prompt_tokens=torch.tensor([prompt_tokens]), texts=[""],
                        completion_tokens=torch.tensor([tokens]), truncated=torch.tensor([False]),
                        sample_logprobs=torch.zeros(1, tokens))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters()])


def random_weights(rollout, size=0.1):
    return size * torch.randn(rollout.completion_mask.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature, logprobs, entropies", [
    (1.0, [-1.407606, -0.094923, -1.098612], [0.832396, 0.366594, 1.098612]),
    (0.6, [-1.869240, -0.013386, -1.098612], [0.556749, 0.079869, 1.098612])])
def test_worked_example(temperature, logprobs, entropies, table_model):
    """ids 0 | 1 1 2: the row before each token predicts it; the last row predicts nothing."""
    model = table_model([[2.0, 1, 0], [0, 3, 0], [1, 1, 1], [0.5, -0.5, 4]])
    actual, entropy = token_logprobs(model, one_row([0, 1, 1, 2], 1), temperature, return_entropy=True)
    close(actual, [logprobs], 1e-6)
    close(entropy, [entropies], 1e-6)


@pytest.mark.parametrize("temperature", (1.0, 0.7, 1.5))
def test_equals_a_plain_forward_pass(architecture, device_and_dtype, temperature, make_model, plain, random_rollout,
                                     full_logprobs):
    model, rollout = make_model(architecture, *device_and_dtype), random_rollout(device=device_and_dtype[0])
    logprobs = token_logprobs(model, rollout, temperature)
    assert logprobs.dtype == torch.float32
    expected = full_logprobs(plain(model), rollout, temperature)
    close(logprobs, expected, 1e-5 if model.dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_gradient_and_entropy_equal_those_of_a_plain_forward_pass(architecture, temperature, make_model, plain,
                                                                  random_rollout):
    model, rollout = make_model(architecture), random_rollout()
    other, weights, loss = plain(model), random_weights(rollout), 0.0
    logprobs, entropy = token_logprobs(model, rollout, temperature, return_entropy=True)
    ours = gradients(model, (weights * logprobs).sum())
    for b, (p, c) in enumerate(zip(rollout.prompt_tokens.tolist(), rollout.completion_tokens.tolist())):
        ids = rollout.ids[b, : p + c]
        logits = other(input_ids=ids[None]).logits[0, p - 1 : -1] / temperature
        loss = loss + sum(weights[b, t] * logits[t].log_softmax(-1)[ids[p + t]] for t in range(c))
        close(entropy[b, :c], torch.distributions.Categorical(logits=logits.detach()).entropy())
    theirs = gradients(other, loss)
    assert theirs.norm() > 0.1 and not entropy.requires_grad
    close(ours, theirs)
    assert not logprobs[~rollout.completion_mask].any() and not entropy[~rollout.completion_mask].any()


@pytest.mark.parametrize("chunk_tokens", (7, 1, 0))
def test_chunk_size_changes_neither_value_nor_gradient(chunk_tokens, make_model, random_rollout, monkeypatch):
    model, rollout, results = make_model(), random_rollout(), []
    for chunk in (grpo.CHUNK, 320 * chunk_tokens):  # 320 words; of fewer logits than one token's, one token's
        monkeypatch.setattr(grpo, "CHUNK", chunk)
        logprobs, entropy = token_logprobs(model, rollout, 0.7, return_entropy=True)
        results.append((logprobs.detach(), entropy, gradients(model, (random_weights(rollout) * logprobs).sum())))
    for whole, part in zip(*results):
        close(part, whole, 2e-6)


def test_entropy_is_computed_when_asked_for_and_not_again_in_the_backward_pass(make_model, random_rollout,
                                                                               monkeypatch):
    calls, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, *args: calls.append(len(self)) or softmax(self, *args))
    monkeypatch.setattr(grpo, "CHUNK", 320 * 10)
    model, rollout = make_model(), random_rollout()
    token_logprobs(model, rollout, 1.0).sum().backward()
    assert calls == []
    token_logprobs(model, rollout, 1.0, return_entropy=True)[0].sum().backward()
    assert len(calls) > 1 and sum(calls) == rollout.completion_tokens.sum()


def test_garbage_in_padding_changes_nothing(make_model, random_rollout):
    model, rollout = make_model(), random_rollout()
    padding = torch.arange(rollout.ids.shape[1]) >= (rollout.prompt_tokens + rollout.completion_tokens)[:, None]
    ids = torch.where(padding, torch.randint(1, 300, padding.shape), rollout.ids)
    assert padding.any() and not torch.equal(rollout.ids, ids)
    logprobs = token_logprobs(model, rollout, 1.0)
    close(token_logprobs(model, dataclasses.replace(rollout, ids=ids), 1.0), logprobs, 1e-6)


def test_neighbours_change_nothing(make_model, random_rollout):
    model, rollout = make_model(), random_rollout()
    together = token_logprobs(model, rollout, 1.0)
    for b in range(len(rollout.texts)):
        alone = token_logprobs(model, rollout.select(torch.tensor([b])), 1.0)[0]
        close(alone, together[b, : len(alone)])


def test_selected_rows_keep_what_belongs_to_them(random_rollout):
    rollout = random_rollout()
    part = rollout.select(torch.tensor([3, 0]))
    assert part.texts == ["3", "0"] and part.ref_logprobs is None
    for i, b in enumerate((3, 0)):
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
    grpo_loss(logprobs, logprobs.detach(), None, rollout.advantages, rollout.completion_mask)[0].backward()
    rows, last = torch.arange(len(rollout.texts)), rollout.completion_tokens - 1
    assert (rollout.ids[rows, rollout.prompt_tokens + last][:-1] == tokenizer.eos_token_id).all()
    assert (logprobs[rows, last] != 0).all() and (logprobs.grad[rows, last] != 0).all()


class Sizes(TorchDispatchMode):
    """Notes the shape of every tensor that is made."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.shapes |= {tuple(value.shape) for value in (made if isinstance(made, (tuple, list)) else [made])
                        if isinstance(value, torch.Tensor)}
        return made


def test_no_logits_beyond_one_chunk_exist_forward_or_backward(make_model, random_rollout, monkeypatch):
    vocab, chunk_tokens, kept, sizes = 1024, 32, [], Sizes()  # kept from the forward pass for the backward pass
    monkeypatch.setattr(grpo, "CHUNK", vocab * chunk_tokens)
    model, rollout = make_model(vocab_size=vocab, hidden_size=16), random_rollout(rows=12, longest=24)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert int(rollout.completion_tokens.sum()) > 3 * chunk_tokens
    note = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t)
    sizes.shapes = set()
    with sizes, note:
        logprobs, _ = token_logprobs(model.train(), rollout, 1.0, return_entropy=True)
        forward, sizes.shapes = sizes.shapes, set()
        logprobs.sum().backward()
    assert kept and not [shape for shape in kept if shape and shape[-1] == vocab]
    for shapes in (forward, sizes.shapes):
        rows = [torch.Size(shape).numel() // vocab for shape in shapes if shape and shape[-1] == vocab]
        assert max(rows) == chunk_tokens  # seen at all, and never more
        assert max(torch.Size(shape).numel() for shape in shapes) <= chunk_tokens * vocab
