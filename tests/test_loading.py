"""Loading models and planning memory. A GPU is played by what torch.cuda.mem_get_info would say."""

import copy
import json
import urllib.error
from types import SimpleNamespace

import pytest
import torch
from test_sampling import sample
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, Qwen2Config

import grpo

SMALL = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, eos_token_id=0, pad_token_id=0, bos_token_id=None)


def test_a_qwen2_with_large_key_biases_loads_in_bfloat16(tmp_path, tokenizer, make_model, full_logprobs):
    model = make_model()
    for layer in model.base_model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=50.0)  # Qwen2.5 has 27 and more
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    rollout = sample(grpo.load_model(str(tmp_path), "cpu", torch.bfloat16), tokenizer)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    torch.testing.assert_close(rollout.sample_logprobs, full_logprobs(other, rollout), atol=0.1, rtol=0)


@pytest.mark.parametrize("config, told", (
    (GraniteConfig(**SMALL, logits_scaling=8.0), "granite"), (Gemma2Config(**SMALL, head_dim=8), "gemma2"),
    (Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1), "qwen2 with a sliding")))
def test_models_of_others_work_or_are_refused(config, told, tmp_path, make_model, tokenizer):
    model = make_model()
    other = AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa")
    other.load_state_dict(model.state_dict())
    assert torch.equal(sample(other, tokenizer).ids, sample(model, tokenizer).ids)
    other = AutoModelForCausalLM.from_config(config)
    other.save_pretrained(tmp_path)
    for load in (lambda: grpo.load_model(str(tmp_path), "cpu", torch.float32), lambda: sample(other, tokenizer)):
        with pytest.raises(grpo.InputError, match=told):
            load()


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return change


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-99])


@pytest.mark.parametrize("damage, told", (
    (cut("model.safetensors"), "cannot be loaded .Error while deserializing header"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    (change_config(model_type="foo"), "model type `foo`"), (change_config(vocab_size=400), "cannot be loaded"),
    (change_config(num_hidden_layers=3, layer_types=["full_attention"] * 3), "lacks weights, as model.layers.2"),
    (change_config(stage="zero"), "is the folder of a run; its model is .*/final"),
    (cut("config.json"), "not a valid JSON"), (cut("tokenizer.json"), "cannot be loaded"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer")))
def test_damaged_checkpoints_are_refused_in_one_sentence(damage, told, tmp_path, make_model, tokenizer):
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    grpo.load_tokenizer(str(tmp_path))
    grpo.load_model(str(tmp_path), "cpu", torch.float32)
    damage(tmp_path)
    with pytest.raises(grpo.InputError, match=told) as error:
        grpo.load_tokenizer(str(tmp_path))
        grpo.load_model(str(tmp_path), "cpu", torch.float32)
    assert str(error.value).startswith(f"model '{tmp_path}'") and "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_tokenizer_without_end_token_is_refused(tmp_path, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(grpo.InputError, match="^teacher .* without end token"):
        grpo.load_tokenizer(str(tmp_path), "teacher")


@pytest.mark.parametrize("answer, reachable", (
    (None, True), (urllib.error.HTTPError("", 503, "", {}, None), True), (TimeoutError(), False)))
def test_the_hub_is_asked_once_and_not_for_long(answer, reachable, monkeypatch):
    def urlopen(url, timeout):
        asked.append(timeout)
        if answer:
            raise answer
        return SimpleNamespace(close=lambda: None)

    asked, kind = [], SimpleNamespace(from_pretrained=lambda path, local_files_only: local_files_only)
    monkeypatch.setattr(grpo.urllib.request, "urlopen", urlopen)
    grpo.hub_is_reachable.cache_clear()
    assert [grpo.load_pretrained(kind, "no/such") for _ in range(2)] == [not reachable] * 2 and asked == [5]
    kind.from_pretrained = None
    with pytest.raises(grpo.InputError, match="'no/such' cannot be loaded .*object is not callable"):
        grpo.load_pretrained(kind, "no/such")
    grpo.hub_is_reachable.cache_clear()


# --- memory

HALF_B, ONE_B, QWEN3 = (896, 4864, 24, 2, 64, 494), (1536, 8960, 28, 2, 128, 1544), (1024, 3072, 28, 8, 128, 596)


def on_a_card(monkeypatch, gb, sizes, dtype=torch.bfloat16, **settings):
    """The settings that `fit_into_memory` gives for a model on a GPU with so much memory."""
    names = "hidden_size intermediate_size num_hidden_layers num_key_value_heads head_dim".split()
    shape = SimpleNamespace(vocab_size=151_936, **dict(zip(names, sizes)))
    model = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, config=shape)
    attention = SimpleNamespace(k_proj=SimpleNamespace(out_features=shape.num_key_value_heads * shape.head_dim))
    model.base_model = SimpleNamespace(layers=[SimpleNamespace(self_attn=attention)])
    model.num_parameters = lambda: sizes[-1] * 10**6
    free = int(1e9 * (gb - 0.5) - model.num_parameters() * dtype.itemsize)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 0))
    return grpo.fit_into_memory(grpo.Config(model="x", data="gsm8k", **settings), model, longest_prompt=200)


def test_max_rows_are_what_memory_holds(monkeypatch):
    small, large = (on_a_card(monkeypatch, gb, HALF_B) for gb in (16, 80))
    assert 32 < small.max_rows < 256 and large.max_rows > 1024  # for prompts_per_step x group_size = 256
    assert on_a_card(monkeypatch, 80, HALF_B, max_rows=64).max_rows == 64
    assert on_a_card(monkeypatch, 24, QWEN3).max_rows > 44  # it was starved at 22
    assert on_a_card(monkeypatch, 24, QWEN3, stage="eval").max_rows > 100
    assert on_a_card(monkeypatch, 14.5, HALF_B, torch.float32, kl_coef=0.0, micro_batch_tokens=4096).max_rows > 64
    with pytest.raises(grpo.InputError) as error:
        on_a_card(monkeypatch, 16, ONE_B)
    for word in "max_completion_tokens micro_batch_tokens group_size kl_coef smaller".split():
        assert word in str(error.value)


def test_a_row_of_the_formula_is_a_row_of_the_decoder(make_model):
    model, cfg = make_model(), grpo.Config(model="x", max_completion_tokens=250)
    decoder = grpo.Decoder(model, (10, 256, 250), [0])
    held = decoder.cache.nbytes
    _, row = grpo.memory_gb(model, cfg, longest_prompt=6)
    assert row * 1e9 * 10 == pytest.approx(held + 10 * 48 * 320)
    assert grpo.fit_into_memory(cfg, model, 6) is cfg  # nothing to plan on a CPU
