"""Shared by all tests: tiny random models of three architectures, a real tokenizer, rollouts of random tokens, and the
oracle for log-probabilities, a plain full forward pass of transformers with its own eager attention."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that plain `pytest` finds grpo.py too
import grpo  # noqa: E402

torch.set_num_threads(1)
CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
DEVICES = {"cpu-float32": ("cpu", torch.float32), "cuda-bfloat16": ("cuda", torch.bfloat16)}


@pytest.fixture(params=CONFIGS)
def architecture(request):
    return request.param


@pytest.fixture(params=DEVICES)
def device_and_dtype(request):
    if request.param.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    return DEVICES[request.param]


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE with one special token that ends and pads, as a Qwen base checkpoint has it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        ["User: What is 3 + 4? Assistant: <think> 3 + 4 is 7 </think> <answer> 7 </answer>"] * 4,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """A function: random weights, four query heads on two key heads, a vocabulary larger than the tokenizer's."""

    def make(architecture="qwen2", device="cpu", dtype=torch.float32, spread=0.1, **settings):
        torch.manual_seed(0)
        shape = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=8, max_position_embeddings=512, bos_token_id=None,
                     tie_word_embeddings=architecture == "qwen2", eos_token_id=tokenizer.eos_token_id,
                     pad_token_id=tokenizer.pad_token_id)
        model = AutoModelForCausalLM.from_config(
            CONFIGS[architecture](**{**shape, **settings}), attn_implementation="grouped", dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():  # biases and norms too, which would start at 0 and 1
                weight.add_(spread * torch.randn_like(weight))
        return model.to(device, dtype).eval()

    return make


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, make_model, tokenizer):
    """A folder with a random checkpoint of each architecture and GSM8K-style problems, sums.jsonl."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in CONFIGS:
        make_model(name).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = [f'{{"question": "What is {a} + {b}?", "answer": "{a} and {b} make {a + b}.\\n#### {a + b}"}}\n'
            for a in range(6) for b in range(5)]
    (root / "sums.jsonl").write_text("".join(rows))
    return root


@pytest.fixture(scope="session")
def plain():
    """A function: a copy of the model that computes as transformers does by itself."""

    def make(model):
        config = copy.deepcopy(model.config)
        other = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=model.dtype)
        other.load_state_dict(model.state_dict())
        return other.to(model.device).eval()

    return make


@pytest.fixture(scope="session")
def full_logprobs():
    """A function: log-probabilities of a rollout's tokens, one row at a time, from the logits of the whole sequence."""

    def compute(model, rollout, temperature=1.0):
        result = torch.zeros(rollout.completion_mask.shape, device=rollout.ids.device)
        for b, (p, c) in enumerate(zip(rollout.prompt_tokens.tolist(), rollout.completion_tokens.tolist())):
            ids = rollout.ids[b : b + 1, : p + c]
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0].float() / temperature
            result[b, :c] = logits.log_softmax(-1)[torch.arange(p - 1, p + c - 1), ids[0, p:]]
        return result

    return compute


@pytest.fixture(scope="session")
def random_rollout(tokenizer):
    """A function: random tokens behind prompts of different lengths; all but the last row end with the end token."""

    def make(rows=6, longest=12, vocab=300, seed=0, device="cpu"):
        draw = torch.Generator().manual_seed(seed)
        prompts, completions = (torch.randint(*ends, (rows,), generator=draw) for ends in ((2, 7), (1, longest + 1)))
        completions[-1] = longest
        ids = torch.full((rows, int((prompts + completions).max())), tokenizer.pad_token_id)
        for b, (p, c) in enumerate(zip(prompts.tolist(), completions.tolist())):
            ids[b, : p + c] = torch.randint(1, vocab, (p + c,), generator=draw)
            ids[b, p + c - 1] = ids[b, p + c - 1] if b == rows - 1 else tokenizer.eos_token_id
        tensors = dict(ids=ids, prompt_tokens=prompts, completion_tokens=completions,
                       truncated=torch.arange(rows) == rows - 1, sample_logprobs=torch.zeros(rows, longest),
                       old_logprobs=-2 * torch.rand(rows, longest, generator=draw),
                       advantages=torch.randn(rows, generator=draw))
        return grpo.Rollout(**{name: value.to(device) for name, value in tensors.items()}, ref_logprobs=None,
                            texts=[str(b) for b in range(rows)])

    return make


class Table(torch.nn.Module):
    """A model without a transformer: its logits at position p are row p of a table, whatever the tokens."""

    def __init__(self, rows):
        super().__init__()
        self.table, self.head = torch.nn.Parameter(torch.tensor(rows)), torch.nn.Identity()
        self.device, self.head.weight = self.table.device, self.table.detach().T  # a row for every word

    def base_model(self, input_ids, use_cache):
        length = input_ids.shape[1]
        return SimpleNamespace(last_hidden_state=self.table[:length].expand(len(input_ids), -1, -1))

    def get_output_embeddings(self):
        return self.head


@pytest.fixture(scope="session")
def table_model():
    return Table
