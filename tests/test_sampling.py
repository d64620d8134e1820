"""Sampling. Oracles: transformers' greedy generate; a sampler without cache that runs a full forward pass for
every token; the softmax itself; a nucleus found by sorting."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

import grpo
from grpo import pick_tokens, sample_completions

PROMPTS = ["User: What is 3 + 4? Assistant:", "x", "User: 3 + 4 is 7", "<think> 7 </think> <answer> 7 </answer>"]


def sample(model, tokenizer, prompts=PROMPTS, **settings):
    settings = {**dict(group_size=3, max_completion_tokens=16, seed=1), **settings}
    return sample_completions(model, tokenizer, prompts, **settings)


def stopping(model, every=12):
    """The same model, one token in twelve of which ends a completion."""
    model.generation_config = GenerationConfig(eos_token_id=[*range(5, 320, every)])
    return model


def completion_ids(rollout):
    lengths = zip(rollout.ids, rollout.prompt_tokens, rollout.completion_tokens)
    return [ids[p : p + c].tolist() for ids, p, c in lengths]


def slow_samples(model, tokenizer, group_size, max_completion_tokens, temperature, top_p):
    """Token by token, no cache, one row at a time, with the same random numbers."""
    stops, draw, result = grpo.stop_token_ids(model, tokenizer), torch.Generator().manual_seed(1), []
    for b, numbers in enumerate(torch.rand(len(PROMPTS) * group_size, max_completion_tokens, generator=draw)):
        ids = start = tokenizer(PROMPTS[b // group_size])["input_ids"]
        for number in numbers:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
            ids = ids + [int(pick_tokens(logits, number[None], temperature, top_p)[0])]
            if ids[-1] in stops:
                break
        result.append(ids[len(start) :])
    return result


# --- against transformers


def test_greedy_equals_generate(architecture, make_model, plain, tokenizer):
    model, settings = make_model(architecture), dict(temperature=0, group_size=2, max_completion_tokens=24)
    stops = [tokenizer.eos_token_id, completion_ids(sample(model, tokenizer, **settings))[0][2]]
    model.generation_config.eos_token_id = stops  # obeyed at once
    rollout = sample(model, tokenizer, **settings)
    for b, ids in enumerate(completion_ids(rollout)):
        inputs = tokenizer(PROMPTS[b // 2], return_tensors="pt", return_token_type_ids=False)
        expected = plain(model).generate(
            **inputs, do_sample=False, max_new_tokens=24, eos_token_id=stops, pad_token_id=0)
        assert ids == expected[0, inputs["input_ids"].shape[1] :].tolist()
    assert min(rollout.completion_tokens) <= 3 and max(rollout.completion_tokens) == 24


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 0.95), (0, 1.0)])
def test_logprobs_are_those_of_a_full_forward_pass(
    architecture, device_and_dtype, temperature, top_p, make_model, plain, tokenizer, full_logprobs
):
    model = stopping(make_model(architecture, *device_and_dtype))
    rollout = sample(model, tokenizer, temperature=temperature, top_p=top_p)
    expected = full_logprobs(plain(model), rollout, temperature or 1.0)
    tolerance = 1e-5 if model.dtype == torch.float32 else 0.1
    torch.testing.assert_close(rollout.sample_logprobs, expected, atol=tolerance, rtol=0)  # dtype too
    assert not rollout.sample_logprobs[~rollout.completion_mask].any()


# --- what must change nothing


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9)])
def test_cache_dropped_rows_and_waves_change_no_token(
    architecture, temperature, top_p, make_model, plain, tokenizer, monkeypatch
):
    model, dropped, drop_ended = stopping(make_model(architecture)), [], grpo.Decoder.drop_ended

    def watched(self, going, t):
        left = drop_ended(self, going, t)
        dropped.append(going - left if left else 0)
        return left

    monkeypatch.setattr(grpo.Decoder, "drop_ended", watched)
    settings = dict(group_size=4, max_completion_tokens=12, temperature=temperature, top_p=top_p)
    rollout, other = sample(model, tokenizer, max_rows=9, **settings), plain(model)
    other.generation_config = model.generation_config
    assert completion_ids(rollout) == slow_samples(other, tokenizer, **settings)
    assert sum(dropped) > 4 and len(set(rollout.completion_tokens.tolist())) > 3
    whole = sample(model, tokenizer, **settings)
    assert torch.equal(whole.ids, rollout.ids) and whole.texts == rollout.texts
    torch.testing.assert_close(whole.sample_logprobs, rollout.sample_logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("neighbour", ("y", "User: What is 7? Assistant: <think> 3 + 4 is 7 </think> " * 3))
@pytest.mark.parametrize("side", ("left", "right"))
def test_neighbours_and_padding_change_nothing(neighbour, side, architecture, make_model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    model = stopping(make_model(architecture))
    alone, beside = sample(model, tokenizer, PROMPTS[:1]), sample(model, tokenizer, [PROMPTS[0], neighbour])
    assert completion_ids(alone) == completion_ids(beside)[:3]
    width = alone.sample_logprobs.shape[1]
    torch.testing.assert_close(alone.sample_logprobs, beside.sample_logprobs[:3, :width], atol=1e-5, rtol=0)


def test_a_seed_gives_the_same_completions_again(architecture, device_and_dtype, make_model, tokenizer):
    model = stopping(make_model(architecture, *device_and_dtype))
    first = sample(model, tokenizer)
    sample(model, tokenizer, PROMPTS * 2, max_completion_tokens=30, temperature=0.5, seed=7)
    again = sample(model, tokenizer)  # in a larger cache, that others have written to
    assert torch.equal(first.ids, again.ids) and len(set(first.texts)) > 9  # a group's differ
    model.generation_config = GenerationConfig(  # of a checkpoint: only its end tokens matter
        eos_token_id=model.generation_config.eos_token_id, top_k=1, temperature=0.01, min_new_tokens=9)
    assert torch.equal(first.ids, sample(model, tokenizer).ids)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)  # new weights in place are the ones that sample
    assert completion_ids(sample(model, tokenizer)) != completion_ids(first)


def test_sampling_is_in_eval_mode_with_the_cache_on(make_model, tokenizer):
    model = make_model(attention_dropout=0.5)
    expected, calls = sample(model, tokenizer), []
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.base_model.register_forward_hook(
        lambda module, args, out: calls.append((module.training, tuple(args[0].shape))))
    for layer in model.base_model.layers:
        layer._gradient_checkpointing_func = None  # fails if it is called
    rollout = sample(model.train(), tokenizer)
    assert torch.equal(rollout.ids, expected.ids) and not rollout.sample_logprobs.requires_grad
    assert calls[0] == (False, (len(PROMPTS), int(rollout.prompt_tokens.max())))  # once a prompt, not a completion
    assert {(training, shape[1]) for training, shape in calls[1:]} == {(False, 1)}


# --- CUDA graphs, played on the CPU


class Recording(TorchDispatchMode):
    """A CUDA graph on the CPU: notes all operations on tensors, and replay() does them again at the same addresses."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a capture cannot wait for the device"
        self.calls.append((func, args, kwargs or {}, func(*args, **(kwargs or {}))))
        return self.calls[-1][3]

    def replay(self):
        self.replays += 1
        for func, args, kwargs, outs in self.calls:
            again = func(*args, **kwargs)
            for out, new in zip(*(x if isinstance(x, (tuple, list)) else [x] for x in (outs, again))):
                if isinstance(out, torch.Tensor) and out.data_ptr() != new.data_ptr():  # neither view nor in place
                    out.copy_(new)


@pytest.fixture
def played_graphs(monkeypatch):
    """Makes the decoder take its way on CUDA; gives the recordings."""
    recordings, begin = [], grpo.Decoder.__init__

    def capture(self, rows):
        with Recording() as recording:
            self.decode(rows)
        recordings.append(recording)
        return recording

    monkeypatch.setattr(grpo.Decoder, "__init__", lambda self, *args: (
        begin(self, *args), setattr(self, "use_graphs", True))[0])
    monkeypatch.setattr(grpo.Decoder, "capture", capture)
    return recordings


def test_replayed_steps_sample_what_steps_sample(architecture, make_model, tokenizer, played_graphs, monkeypatch):
    settings = [dict(seed=seed, temperature=t, top_p=p, group_size=4, max_completion_tokens=40, prompts=prompts)
                for seed, t, p, prompts in ((1, 1.0, 1.0, PROMPTS), (2, 0.6, 0.9, PROMPTS), (3, 1.0, 1.0, PROMPTS[1:]),
                                            (1, 1.0, 1.0, PROMPTS), (4, 1.0, 1.0, PROMPTS[::-1]))]
    model, replayed, addresses = stopping(make_model(architecture), every=40), [], []
    for setting in settings:
        replayed.append(sample(model, tokenizer, **setting))
        held = vars(model.grpo_decoder).items()
        addresses.append({name: value.data_ptr() for name, value in held if isinstance(value, torch.Tensor)})
    assert addresses == addresses[:1] * len(settings)
    assert sum(recording.replays for recording in played_graphs) > 3 * len(played_graphs) > 6
    monkeypatch.undo()
    for setting, rollout in zip(settings, replayed):
        model.grpo_decoder = None
        expected = sample(model, tokenizer, **setting)
        assert torch.equal(rollout.ids, expected.ids) and rollout.texts == expected.texts
        torch.testing.assert_close(rollout.sample_logprobs, expected.sample_logprobs, atol=1e-5, rtol=0)


def test_two_models_with_decoders_live_side_by_side(device_and_dtype, make_model, tokenizer, request):
    if device_and_dtype[0] == "cpu":
        request.getfixturevalue("played_graphs")
    models = [stopping(make_model(name, *device_and_dtype)) for name in ("qwen2", "llama")]
    first = [sample(model, tokenizer, max_completion_tokens=40).ids for model in models]
    for turn in (0, 1, 0, 1):
        assert torch.equal(sample(models[turn], tokenizer, max_completion_tokens=40).ids, first[turn])
    models[0].grpo_decoder = None  # its graphs go; those of the other stay whole
    assert torch.equal(sample(models[1], tokenizer, max_completion_tokens=40).ids, first[1])


def test_a_capture_that_fails_leaves_no_graph_behind(make_model, tokenizer, played_graphs, monkeypatch):
    model, capture = make_model(), grpo.Decoder.capture
    monkeypatch.setattr(grpo.Decoder, "capture", lambda self, rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(model, tokenizer)
    monkeypatch.setattr(grpo.Decoder, "capture", capture)
    assert torch.equal(sample(model, tokenizer).ids, sample(make_model(), tokenizer).ids)


# --- the distribution


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_frequencies_follow_the_softmax(temperature, make_model, plain, tokenizer):
    model, settings = make_model("llama", spread=0.2), dict(group_size=12_000, max_completion_tokens=1, seed=0)
    rollout = sample(model, tokenizer, PROMPTS[:1], temperature=temperature, **settings)
    with torch.no_grad():
        probs = (plain(model)(input_ids=rollout.ids[:1, :-1]).logits[0, -1] / temperature).softmax(-1)
    counts = rollout.ids[:, -1].bincount(minlength=320)
    assert ((counts - 12_000 * probs).abs() < 4 * (12_000 * probs).sqrt() + 3).all()


@pytest.mark.parametrize("vocab, spread", ((1, 1.0), (50, 3.0), (4_000, 1.0), (30_000, 4.0)))
@pytest.mark.parametrize("top_p", (0.1, 0.5, 0.95, 0.999))
def test_top_p_equals_the_nucleus_found_by_sorting(vocab, spread, top_p):
    draw = torch.Generator().manual_seed(0)
    logits, uniform = spread * torch.randn(40, vocab, generator=draw), torch.rand(40, generator=draw)
    probs, order = (logits / 0.6).softmax(-1).sort(descending=True)
    probs = torch.zeros_like(probs).scatter(1, order, probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0))
    cumulative = probs.cumsum(-1)
    expected = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    tokens, logprobs = pick_tokens(logits, uniform, 0.6, top_p)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, (logits / 0.6).log_softmax(-1)[torch.arange(40), tokens])  # of all words


def test_top_p_keeps_ties_and_what_4096_words_do_not_hold():
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    tied = torch.tensor([0.4, 0.2, 0.2, 0.2]).log().expand(20_000, -1)
    assert pick_tokens(tied, uniform, 1.0, 0.5)[0].bincount().tolist() == [8000, 4000, 4000, 4000]
    flat = torch.arange(10_000)[None] * 1e-6  # the 4,096 most probable hold less than a half
    assert pick_tokens(flat.expand(50, -1), uniform[::400], 1.0, 0.5)[0].min() < 200


def test_drawing_inverts_the_cumulative_sum():
    probs = torch.tensor([0.0, 0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    uniform = torch.tensor([0.0, 0.1, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 1e-6])
    for temperature, top_p, expected in ((1.0, 1.0, [2, 2, 2, 4, 4, 5, 5]), (1.0, 0.4, [4] * 7), (0, 0.1, [4] * 7)):
        tokens, logprobs = pick_tokens(probs.log().expand(7, -1), uniform, temperature, top_p)
        assert tokens.tolist() == expected
        torch.testing.assert_close(logprobs, probs[tokens].log())
    logits = 4 * torch.randn(64, 5_000, generator=torch.Generator().manual_seed(0))
    logits[:, :100] = logits[:, -100:] = -float("inf")
    for number in (0.0, 1e-8, 1 - 1e-6):  # the ends of the uniform draw possible tokens
        tokens, logprobs = pick_tokens(logits, torch.full((64,), number), 1.0, 0.95)
        assert logprobs.isfinite().all() and tokens.min() >= 100 and tokens.max() < 4_900


# --- where a completion ends, and its text


def spelled(model, tokenizer, monkeypatch, rows, prompt="x"):
    """A rollout whose drawn tokens are given, row by row."""
    script, calls = torch.tensor(rows), []

    def pick(logits, uniform, temperature, top_p=1.0):
        calls.append(1)
        alive = (uniform * len(rows)).long()  # the random number tells which row this is
        return script[alive, len(calls) - 1], torch.full((len(logits),), -1.0)

    numbers = (torch.arange(len(rows)) + 0.5) / len(rows)
    monkeypatch.setattr(grpo.torch, "rand", lambda n, width, generator: numbers[:, None].expand(n, width).clone())
    monkeypatch.setattr(grpo, "pick_tokens", pick)
    return sample(model, tokenizer, [prompt], group_size=len(rows), max_completion_tokens=script.shape[1])


@pytest.mark.parametrize("stops, last", [(2, 3), ([2, 3], 2)])
def test_completion_mask_ends_with_the_first_end_token(stops, last, make_model, tokenizer, monkeypatch):
    model, rows = make_model(), ((5, 7, 2, 0, 0), (5, 2, 9, 9, 9), (4,) * 5, (2,) * 5, (6, 3, 2, 2, 2), (8, 8, 8, 8, 2))
    model.generation_config.eos_token_id = stops
    rollout = spelled(model, tokenizer, monkeypatch, rows)
    assert rollout.completion_tokens.tolist() == [3, 2, 5, 1, last, 5]
    assert rollout.completion_mask.tolist() == [[t < n for t in range(5)] for n in (3, 2, 5, 1, last, 5)]
    assert rollout.truncated.tolist() == [False, False, True, False, False, False]
    assert torch.equal(rollout.sample_logprobs, -rollout.completion_mask.float())


def test_padding_that_equals_the_end_token_is_not_in_the_mask(make_model, tokenizer, monkeypatch):
    end = tokenizer.eos_token_id
    rollout = spelled(make_model(), tokenizer, monkeypatch, [[8, end, end, end], [end] * 4, [8] * 4])
    assert rollout.completion_tokens.tolist() == [2, 1, 4]
    assert rollout.texts == [tokenizer.decode([8]), "", tokenizer.decode([8] * 4)]
    monkeypatch.setattr(grpo.Decoder, "step", None)  # not called where all end with their first token
    assert spelled(make_model(), tokenizer, monkeypatch, [[end] * 6] * 2).sample_logprobs.shape == (2, 1)


def test_stop_tokens_are_the_union_of_model_tokenizer_and_the_ends_of_turns(make_model, tokenizer):
    model, tokenizer = make_model(), copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    turn = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    for listed, expected in ((None, {0, turn}), (7, {0, 7, turn}), ([7, 9], {0, 7, 9, turn})):
        model.generation_config.eos_token_id = listed
        assert grpo.stop_token_ids(model, tokenizer) == expected


@pytest.mark.parametrize("prompt, start", [("Assistant: <think>\n", "<think>"), ("<think> Assistant:", "")])
def test_a_prefilled_tag_belongs_to_the_text(prompt, start, make_model, tokenizer, monkeypatch):
    rows = [tokenizer(" 3 + 4")["input_ids"] + [319, tokenizer.eos_token_id]]  # 319: the tokenizer has fewer
    assert spelled(make_model(), tokenizer, monkeypatch, rows, prompt).texts == [start + " 3 + 4"]


@pytest.mark.parametrize("changes", [dict(prompts="3 + 4"), dict(prompts=[]), dict(group_size=0),
                                     dict(max_completion_tokens=0), dict(temperature=-0.1)])
def test_what_makes_no_sense_is_refused_in_words(changes, make_model, tokenizer):
    with pytest.raises(ValueError, match="must be a list of texts"):
        sample(make_model(), tokenizer, **changes)
