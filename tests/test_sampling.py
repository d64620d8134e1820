"""Sampling. Oracles: transformers' greedy generate; a sampler without cache that runs a full forward pass for every
token; softmax(logits / T) by a chi-square test."""

import copy

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import TopPLogitsWarper

import grpo
from grpo import pick_tokens, sample_completions

PROMPTS = [
    "User: What is 3 + 4? Assistant:",
    "x",
    "User: 3 + 4 is 7",
    "<think> 7 </think> <answer> 7 </answer>",
]


def sample(model, tokenizer, prompts=PROMPTS, **settings):
    return sample_completions(
        model, tokenizer, prompts, **{**dict(group_size=3, max_completion_tokens=16, seed=1), **settings}
    )


def stopping(model, tokenizer, every=12):
    """The same model, one token in twelve of which ends a completion."""
    model.generation_config = GenerationConfig(eos_token_id=[*range(5, 320, every)])
    return model


def completion_ids(rollout):
    return [
        ids[p : p + c].tolist()
        for ids, p, c in zip(rollout.ids, rollout.prompt_tokens, rollout.completion_tokens)
    ]


def slow_samples(
    model, tokenizer, prompts, group_size, max_completion_tokens, temperature=1.0, top_p=1.0, seed=1
):
    """Token by token, no cache, one row at a time, with the same random numbers."""
    stops = grpo.stop_token_ids(model, tokenizer)
    uniform = torch.rand(
        len(prompts) * group_size, max_completion_tokens, generator=torch.Generator().manual_seed(seed)
    )
    result = []
    for b, numbers in enumerate(uniform):
        ids = start = tokenizer(prompts[b // group_size])["input_ids"]
        for number in numbers:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
            token = int(pick_tokens(logits, number[None], temperature, top_p)[0])
            ids = ids + [token]
            if token in stops:
                break
        result.append(ids[len(start) :])
    return result


def p_value(tokens, probs, at_least=20):
    """Of Pearson's chi-square test; tokens are put together until they are expected often enough."""
    bins, expected = torch.zeros(len(probs), dtype=torch.long), [0.0]
    for token in probs.argsort().tolist():
        if expected[-1] >= at_least:
            expected.append(0.0)
        expected[-1] += float(probs[token]) * len(tokens)
        bins[token] = len(expected) - 1
    expected = torch.tensor(expected, dtype=torch.float64)
    statistic = ((bins[tokens].bincount(minlength=len(expected)) - expected) ** 2 / expected).sum()
    assert len(expected) > 5
    return float(
        torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.float64), statistic / 2)
    )


# --- against transformers


def test_greedy_equals_generate(architecture, make_model, plain, tokenizer):
    model = make_model(architecture)
    settings = dict(temperature=0, group_size=2, max_completion_tokens=24)
    third = completion_ids(sample(model, tokenizer, **settings))[0][2]
    stops = [tokenizer.eos_token_id, third]
    model.generation_config.eos_token_id = stops
    rollout = sample(model, tokenizer, **settings)
    for b, ids in enumerate(completion_ids(rollout)):
        inputs = tokenizer(PROMPTS[b // 2], return_tensors="pt")
        expected = plain(model).generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=stops,
            pad_token_id=0,
        )[0, inputs["input_ids"].shape[1] :]
        assert ids == expected.tolist()
    lengths = rollout.completion_tokens.tolist()
    assert min(lengths) <= 3 and max(lengths) == 24 and len(set(map(tuple, completion_ids(rollout)))) == 4


def test_greedy_takes_the_most_probable_token(architecture, device_and_dtype, make_model, plain, tokenizer):
    model = make_model(architecture, *device_and_dtype)
    rollout = sample(model, tokenizer, temperature=0)
    for b, (p, c) in enumerate(zip(rollout.prompt_tokens.tolist(), rollout.completion_tokens.tolist())):
        ids = rollout.ids[b, : p + c]
        with torch.no_grad():
            logits = plain(model)(input_ids=ids[None]).logits[0, p - 1 : -1].float()
        chosen = logits.gather(1, ids[p:, None])[:, 0]
        assert (logits.amax(-1) - chosen).max() <= (1e-5 if model.dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (0.6, 0.95), (0, 1.0)])
def test_logprobs_are_those_of_a_full_forward_pass(
    architecture, device_and_dtype, temperature, top_p, make_model, plain, tokenizer, full_logprobs
):
    model = stopping(make_model(architecture, *device_and_dtype), tokenizer)
    rollout = sample(model, tokenizer, temperature=temperature, top_p=top_p)
    expected = full_logprobs(plain(model), rollout, temperature or 1.0)
    tolerance = 1e-5 if model.dtype == torch.float32 else 0.1
    torch.testing.assert_close(rollout.sample_logprobs, expected, atol=tolerance, rtol=0)
    assert (
        rollout.sample_logprobs.dtype == torch.float32
        and not rollout.sample_logprobs[~rollout.completion_mask].any()
    )


# --- what must change nothing


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9)])
def test_cache_compaction_and_waves_change_no_token(
    architecture, temperature, top_p, make_model, plain, tokenizer, monkeypatch
):
    model = stopping(make_model(architecture), tokenizer)
    dropped, drop_ended = [], grpo.Decoder.drop_ended
    monkeypatch.setattr(
        grpo.Decoder,
        "drop_ended",
        lambda self, rows, keep: (dropped.append(rows - keep), drop_ended(self, rows, keep)),
    )
    settings = dict(group_size=4, max_completion_tokens=12, temperature=temperature, top_p=top_p)
    rollout = sample(model, tokenizer, max_rows=9, **settings)
    other = plain(model)
    other.generation_config = model.generation_config
    assert completion_ids(rollout) == slow_samples(other, tokenizer, PROMPTS, **settings)
    assert sum(dropped) > 4 and len(set(rollout.completion_tokens.tolist())) > 3


@pytest.mark.parametrize("max_rows", (3, 6, 8, 12, 100))
def test_waves_change_nothing(max_rows, make_model, tokenizer):
    whole, waves = (
        sample(stopping(make_model(), tokenizer), tokenizer, max_rows=rows) for rows in (None, max_rows)
    )
    assert torch.equal(whole.ids, waves.ids) and whole.texts == waves.texts
    torch.testing.assert_close(whole.sample_logprobs, waves.sample_logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("neighbour", ("y", "User: What is 7? Assistant: <think> 3 + 4 is 7 </think> " * 3))
def test_neighbours_and_padding_change_nothing(neighbour, architecture, make_model, tokenizer):
    model = stopping(make_model(architecture), tokenizer)
    alone, beside = sample(model, tokenizer, PROMPTS[:1]), sample(model, tokenizer, [PROMPTS[0], neighbour])
    assert completion_ids(alone) == completion_ids(beside)[:3]
    width = alone.sample_logprobs.shape[1]
    torch.testing.assert_close(alone.sample_logprobs, beside.sample_logprobs[:3, :width], atol=1e-5, rtol=0)


def test_what_was_sampled_before_changes_nothing(make_model, tokenizer):
    model = stopping(make_model(), tokenizer)
    first = sample(model, tokenizer)
    sample(model, tokenizer, PROMPTS * 2, max_completion_tokens=30, temperature=0.5, seed=7)
    again = sample(model, tokenizer)
    assert torch.equal(first.ids, again.ids) and torch.equal(first.completion_tokens, again.completion_tokens)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)  # new weights in place are the ones that sample
    assert not torch.equal(sample(model, tokenizer).ids[:, :24], first.ids[:, :24])


def test_a_seed_gives_the_same_completions_again(architecture, device_and_dtype, make_model, tokenizer):
    model = stopping(make_model(architecture, *device_and_dtype), tokenizer)
    rollouts = [sample(model, tokenizer, seed=seed) for seed in (5, 5, 6)]
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(rollouts[0].ids, rollouts[1].ids)
    assert torch.equal(rollouts[0].sample_logprobs, rollouts[1].sample_logprobs)
    assert completion_ids(rollouts[0]) != completion_ids(rollouts[2])


def test_the_completions_of_a_group_are_neighbours_and_differ(make_model, tokenizer):
    rollout = sample(make_model(), tokenizer, group_size=4)
    for b, ids in enumerate(rollout.ids.tolist()):
        assert ids[: rollout.prompt_tokens[b]] == tokenizer(PROMPTS[b // 4])["input_ids"]
    assert len(set(rollout.texts)) == 16


@pytest.mark.parametrize(
    "setting",
    (
        dict(top_k=1),
        dict(temperature=0.01),
        dict(top_p=0.01),
        dict(repetition_penalty=9.0),
        dict(do_sample=False),
        dict(max_new_tokens=2),
        dict(min_new_tokens=9),
    ),
)
def test_the_checkpoints_generation_config_has_no_influence(setting, make_model, tokenizer):
    model = make_model()
    expected = sample(model, tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, **setting)
    assert torch.equal(sample(model, tokenizer).ids, expected.ids)


def test_sampling_is_in_eval_mode_with_the_cache_on(make_model, tokenizer):
    model = make_model(attention_dropout=0.5)
    expected = sample(model, tokenizer)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    model.base_model.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((module.training, tuple(kwargs["input_ids"].shape))),
        with_kwargs=True,
    )
    for layer in model.base_model.layers:
        layer._gradient_checkpointing_func = None  # fails if it is called
    rollout = sample(model.train(), tokenizer)
    assert torch.equal(rollout.ids, expected.ids) and not rollout.sample_logprobs.requires_grad
    assert calls[0] == (
        False,
        (len(PROMPTS), int(rollout.prompt_tokens.max())),
    )  # one prefill per prompt, not per completion
    assert {(training, shape[1]) for training, shape in calls[1:]} == {(False, 1)}


# --- the distribution


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_frequencies_follow_the_softmax(temperature, make_model, plain, tokenizer):
    model, rows = make_model("llama", spread=0.2), 12_000
    rollout = sample(
        model,
        tokenizer,
        PROMPTS[:1],
        group_size=rows,
        max_completion_tokens=2,
        temperature=temperature,
        seed=0,
    )
    ids, p = rollout.ids, int(rollout.prompt_tokens[0])
    first = ids[:, p]
    common = int(first.mode().values)
    second = ids[(first == common) & (rollout.completion_tokens == 2), p + 1]
    for drawn, prefix in ((first, ids[0, :p]), (second, torch.cat([ids[0, :p], torch.tensor([common])]))):
        with torch.no_grad():
            logits = plain(model)(input_ids=prefix[None]).logits[0, -1]
        assert p_value(drawn, (logits / temperature).softmax(-1)) > 1e-3
        assert (
            p_value(drawn, (logits / (1.7 - temperature)).softmax(-1)) < 1e-6
        )  # it can tell temperatures apart


def test_every_token_of_the_vocabulary_can_be_drawn(make_model, tokenizer):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all equally probable
    rollout = sample(model, tokenizer, PROMPTS[:1], group_size=6_000, max_completion_tokens=1)
    assert rollout.ids[:, -1].unique().tolist() == list(range(320))


@pytest.mark.parametrize("top_p", (0.1, 0.5, 0.9, 0.95, 0.999))
def test_top_p_draws_exactly_the_nucleus(top_p):
    logits = 3 * torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    kept = TopPLogitsWarper(top_p)(None, logits / 0.6)[0].softmax(-1)
    uniform = (torch.arange(40_000) + 0.5) / 40_000
    tokens, logprobs = pick_tokens(logits.expand(40_000, -1), uniform, 0.6, top_p)
    counts = tokens.bincount(minlength=50)
    assert torch.equal(counts > 0, kept > 0) or (kept[(counts > 0) != (kept > 0)] < 1e-4).all()
    torch.testing.assert_close(counts / 40_000, kept, atol=1e-4, rtol=0)
    torch.testing.assert_close(logprobs, (logits / 0.6).log_softmax(-1)[0, tokens])  # of the full softmax


def test_drawing_inverts_the_cumulative_sum():
    probs = torch.tensor([0.0, 0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    uniform = torch.tensor([0.0, 0.1, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 1e-6])
    tokens, logprobs = pick_tokens(probs.log().expand(7, -1), uniform, 1.0)
    assert tokens.tolist() == [2, 2, 2, 4, 4, 5, 5]
    torch.testing.assert_close(logprobs, probs[tokens].log())


@pytest.mark.parametrize("top_p", (1.0, 0.95))
def test_the_ends_of_the_uniform_draw_possible_tokens(top_p):
    logits = 4 * torch.randn(64, 5_000, generator=torch.Generator().manual_seed(0))
    logits[:, :100] = logits[:, -100:] = -float("inf")
    for number in (0.0, 1e-8, 1 - 1e-6):
        tokens, logprobs = pick_tokens(logits, torch.full((64,), number), 1.0, top_p)
        assert logprobs.isfinite().all() and tokens.min() >= 100 and tokens.max() < 4_900


def test_greedy_ignores_the_random_number_and_top_p():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    for number, top_p in ((0.0, 1.0), (0.999, 0.1)):
        tokens, logprobs = pick_tokens(logits, torch.full((5,), number), 0, top_p)
        assert torch.equal(tokens, logits.argmax(-1))
        torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))


# --- where a completion ends


def spelled(model, tokenizer, monkeypatch, rows, prompts=("x",), **settings):
    """A rollout whose drawn tokens are given, row by row."""
    script, place = torch.tensor(rows), {"t": 0}

    def pick(logits, uniform, temperature, top_p=1.0):
        alive = (uniform * len(rows)).long()  # the random number tells which row this is
        place["t"] += 1
        return script[alive, place["t"] - 1], torch.full((len(logits),), -1.0)

    numbers = (torch.arange(len(rows)) + 0.5) / len(rows)
    monkeypatch.setattr(
        grpo.torch, "rand", lambda n, width, generator: numbers[:, None].expand(n, width).clone()
    )
    monkeypatch.setattr(grpo, "pick_tokens", pick)
    return sample_completions(
        model,
        tokenizer,
        list(prompts),
        group_size=len(rows),
        max_completion_tokens=script.shape[1],
        **settings,
    )


ROWS = [[5, 7, 2, 0, 0], [5, 2, 9, 9, 9], [4, 4, 4, 4, 4], [2, 2, 2, 2, 2], [6, 3, 2, 2, 2]]


@pytest.mark.parametrize("stops, last", [(2, [1, 1, 1, 0, 0]), ([2, 3], [1, 1, 0, 0, 0])])
def test_completion_mask_ends_with_the_first_end_token(stops, last, make_model, tokenizer, monkeypatch):
    model = make_model()
    model.generation_config.eos_token_id = stops
    rollout = spelled(model, tokenizer, monkeypatch, ROWS)
    assert rollout.completion_mask.int().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0],
        last,
    ]
    assert rollout.truncated.tolist() == [False, False, True, False, False]
    assert rollout.completion_tokens.tolist() == rollout.completion_mask.sum(1).tolist()
    assert torch.equal(rollout.sample_logprobs, -rollout.completion_mask.float())


def test_an_end_token_in_the_last_place_is_no_truncation(make_model, tokenizer, monkeypatch):
    end = tokenizer.eos_token_id
    rollout = spelled(make_model(), tokenizer, monkeypatch, [[8, 8, end], [8, 8, 8], [end, 8, 8]])
    assert rollout.truncated.tolist() == [False, True, False]
    assert rollout.completion_tokens.tolist() == [3, 3, 1]


def test_padding_that_equals_the_end_token_is_not_in_the_mask(make_model, tokenizer, monkeypatch):
    end = tokenizer.eos_token_id
    rollout = spelled(
        make_model(), tokenizer, monkeypatch, [[8, end, end, end], [end, end, end, end], [8, 8, 8, 8]]
    )
    assert rollout.completion_tokens.tolist() == [2, 1, 4]
    assert rollout.texts == [tokenizer.decode([8]), "", tokenizer.decode([8] * 4)]


def test_when_all_stop_on_the_first_token_nothing_else_is_drawn(make_model, tokenizer, monkeypatch):
    model, end = make_model(), tokenizer.eos_token_id
    steps = []
    monkeypatch.setattr(grpo.Decoder, "step", lambda *args: steps.append(args))
    rollout = spelled(model, tokenizer, monkeypatch, [[end] * 6, [end] * 6])
    assert rollout.sample_logprobs.shape == (2, 1) and rollout.texts == ["", ""] and not steps
    assert not rollout.truncated.any()


def test_a_single_token_is_the_shortest_limit(make_model, tokenizer):
    rollout = sample(make_model(), tokenizer, max_completion_tokens=1)
    assert rollout.completion_tokens.tolist() == [1] * 12


def test_stop_tokens_are_the_union_of_model_tokenizer_and_template(make_model, tokenizer):
    model, tokenizer = make_model(), copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    for listed, expected in ((None, {0}), (7, {0, 7}), ([7, 9], {0, 7, 9})):
        model.generation_config.eos_token_id = listed
        assert grpo.stop_token_ids(model, tokenizer) == expected
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|turn|>\n{% endfor %}"
    )
    assert grpo.stop_token_ids(model, tokenizer) == {0, 7, 9, turn}


def test_new_stop_tokens_are_obeyed_at_once(make_model, tokenizer):
    model = make_model()
    free = sample(model, tokenizer)
    third = completion_ids(free)[0][2]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, third]
    stopped = sample(model, tokenizer)
    for before, after in zip(completion_ids(free), completion_ids(stopped)):
        assert after == (before[: before.index(third) + 1] if third in before else before)


# --- texts


@pytest.mark.parametrize(
    "prompt, start",
    [
        ("Assistant: <think>", "<think>"),
        ("Assistant: <think>\n", "<think>"),
        ("Assistant:", ""),
        ("<think> Assistant:", ""),
    ],
)
def test_a_prefilled_tag_belongs_to_the_text(prompt, start, make_model, tokenizer, monkeypatch):
    rows = [tokenizer(" 3 + 4")["input_ids"] + [tokenizer.eos_token_id]]
    rollout = spelled(make_model(), tokenizer, monkeypatch, rows, [prompt])
    assert rollout.texts == [start + " 3 + 4"]
    assert rollout.prompt_tokens.tolist() == [len(tokenizer(prompt)["input_ids"])]


def test_ids_beyond_the_tokenizer_are_decoded_without_error(make_model, tokenizer, monkeypatch):
    assert len(tokenizer) < 319
    rollout = spelled(make_model(), tokenizer, monkeypatch, [[8, 319, 9, 0]])
    assert rollout.texts == [tokenizer.decode([8, 9])]
