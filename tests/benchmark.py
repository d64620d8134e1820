"""How fast sampling and the update are on this machine, next to what else could be used.

    python tests/benchmark.py                                  # CPU: the embedded shape; GPU: the 0.5B shape
    python tests/benchmark.py --model runs/zero/final          # a trained embedded model, lengths vary
    python tests/benchmark.py --shape 1.5B --rows 512 --compile

Shapes have random weights: speed does not depend on them, and nothing is downloaded. Every figure is the
median of `--repeats` runs after one that is not counted; tokens are those up to each completion's end token.
The floor is the time to read the weights, keys and values of a step once, at the bandwidth that a copy
reaches here. With trl installed the table ends with a step of its GRPOTrainer (not for the embedded shape,
whose words are too few).
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).parents[1]))
import grpo  # noqa: E402
import test_rewards  # noqa: E402

SHAPES = {  # hidden, FFN, layers, heads, key-value heads, vocabulary
    "small": (128, 384, 4, 4, 2, 2_048),
    "embedded": (64, 384, 2, 4, 4, 163),
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936),
    "3B": (2048, 11_008, 36, 16, 2, 151_936),
}


class Numbers:
    """A tokenizer whose texts are numbers, for models that know no words."""

    bos_token = chat_template = None
    eos_token_id = pad_token_id = 1
    all_special_ids = [1]

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def random_model(shape: str, device, dtype):
    """A Qwen2 of this shape that never ends by itself: its end token is one that is hardly ever drawn."""
    hidden, ffn, layers, heads, kv_heads, vocab = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
        max_position_embeddings=4096,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="grouped")
    return model.eval()


def timed(function, repeats: int, device) -> tuple[float, float, object]:
    """Median seconds, peak GB of device memory, and the last result."""
    seconds, result = [], None
    for repeat in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if repeat:
            seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    return statistics.median(seconds), peak, result


def row(name: str, tokens: float, seconds: float, peak: float, base: float | None = None):
    """A line of the table."""
    against = f"{tokens / seconds / base:6.2f} x" if base else ""
    gb = f"{peak:9.2f}" if peak == peak else f"{'-':>9}"
    print(f"{name:54}{tokens / seconds:>12,.0f}{seconds:>10.2f}{gb}  {against}", flush=True)
    return tokens / seconds


def generate(model, tokenizer, prompts, args, cache):
    """`model.generate` on the same prompts, left-padded, same temperature and limit -> tokens produced."""
    encoded = [grpo.encode_prompt(tokenizer, prompt) for prompt in prompts for _ in range(args.group_size)]
    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(e)) + e for e in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded], device=model.device)
    stops = sorted(grpo.stop_token_ids(model, tokenizer))
    out = model.generate(
        ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=args.completion,
            eos_token_id=stops,
            pad_token_id=stops[0],
            cache_implementation=cache,
        ),
    )[:, width:]
    ended = torch.isin(out, torch.tensor(stops, device=out.device))
    return int(torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1]).sum())


def full_logprobs(model, rollout, temperature, *_):
    """`token_logprobs` as it is usually written, with all logits at once: the yardstick of the chunks."""
    logits = model(input_ids=rollout.ids, use_cache=False).logits.float() / temperature
    logprobs = logits[:, :-1].log_softmax(-1).gather(2, rollout.ids[:, 1:, None])[..., 0]
    mask = rollout.completion_mask
    r, t = mask.nonzero(as_tuple=True)
    picked = logprobs[r, rollout.prompt_tokens[r] + t - 1]
    return torch.zeros(mask.shape, device=mask.device).index_put((r, t), picked), torch.zeros(1)


def trl_step(model, args):
    """Seconds of a step of TRL's GRPOTrainer on the same weights and lengths; None without trl."""
    try:
        from datasets import Dataset
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        return None
    seconds, started = [], [time.perf_counter()]
    bytes_ = Tokenizer(models.BPE())  # a token a byte, so that a prompt has as many tokens as letters
    bytes_.pre_tokenizer, bytes_.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bytes_.train_from_iterator(
        [""],
        trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="</s>", pad_token="</s>")

    def reward(completions, **_):  # called once a step
        seconds.append(time.perf_counter() - started[0])
        started[0] = time.perf_counter()
        return [float(len(completion) % 2) for completion in completions]

    with tempfile.TemporaryDirectory() as folder:
        model.set_attn_implementation("sdpa")
        model.save_pretrained(folder)
        model.set_attn_implementation("grouped")
        gpu = torch.cuda.is_available()
        config = GRPOConfig(
            output_dir=folder, max_steps=args.repeats + 2, num_generations=args.group_size, beta=0.001,
            per_device_train_batch_size=min(args.rows, 32),
            gradient_accumulation_steps=max(1, args.rows // 32),
            max_completion_length=args.completion, gradient_checkpointing=True, temperature=1.0, report_to=[],
            save_strategy="no", bf16=gpu, use_cpu=not gpu, disable_tqdm=True,
            model_init_kwargs={"dtype": model.dtype},
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": ["q" * args.prompt] * 4096})
        trainer = GRPOTrainer(
            model=folder, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer
        )
        trainer.train()
    return statistics.median(seconds[2:])  # the first holds the start, the second what is compiled or cached


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="0.5B" if gpu else "embedded")
    parser.add_argument("--model", help="a checkpoint folder instead of a shape")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--group_size", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128 if gpu else 8, help="tokens")
    parser.add_argument("--completion", type=int, default=512 if gpu else 160, help="tokens")
    parser.add_argument("--micro_batch_tokens", type=int, default=20_480)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--trl_model", help="checkpoint folder for a step of TRL's GRPOTrainer, if trl is installed"
    )
    args = parser.parse_args()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    torch.manual_seed(0)
    grpo.transformers.utils.logging.disable_progress_bar()

    count = args.rows // args.group_size
    if args.model:
        tokenizer, model = grpo.load_tokenizer(args.model), grpo.load_model(args.model, device, dtype)
        questions = [problem.question for problem in grpo.load_problems("calculator")[:count]]
        prompts = [grpo.TINY["template"].replace("{question}", question) for question in questions]
    else:
        tokenizer, model = Numbers(), random_model(args.shape, device, dtype)
        ids = torch.randint(2, min(100, SHAPES[args.shape][-1]), (count, args.prompt)).tolist()
        prompts = [" ".join(map(str, row)) for row in ids]
    parameters = model.num_parameters()
    print(
        f"{torch.cuda.get_device_name() if gpu else f'CPU, {torch.get_num_threads()} threads'}, torch "
        f"{torch.__version__}, {args.model or args.shape}: {parameters:,} weights, {dtype}; {args.rows} x "
        f"{args.prompt} + {args.completion} tokens, {args.repeats} runs"
    )
    print(f"{'':54}{'tokens/s':>12}{'seconds':>10}{'peak GB':>9}")

    def sample(compile=False, seed=0):
        return grpo.sample_completions(
            model,
            tokenizer,
            prompts,
            group_size=args.group_size,
            seed=seed,
            max_completion_tokens=args.completion,
            compile=compile,
        )

    base = None
    for name, cache in (
        ("model.generate, dynamic cache", "dynamic"),
        ("model.generate, static cache", "static"),
    ):
        if cache == "static" and not gpu:
            continue  # it compiles for minutes before it is any faster
        model.set_attn_implementation("sdpa")
        seconds, peak, tokens = timed(
            lambda: generate(model, tokenizer, prompts, args, cache), args.repeats, device
        )
        base = base or tokens / seconds
        row(name, tokens, seconds, peak, base)
    model.set_attn_implementation("grouped")
    sample_seconds = {}
    for compile in (False, True) if args.compile else (False,):
        model.grpo_decoder = None
        seconds, peak, rollout = timed(lambda: sample(compile), args.repeats, device)
        sample_seconds[compile] = seconds
        row(
            "sample_completions" + ", compiled" * compile,
            int(rollout.completion_tokens.sum()),
            seconds,
            peak,
            base,
        )
    steps = int(rollout.completion_tokens.max())
    source = torch.empty(256 * 2**20 if gpu else 64 * 2**20, dtype=torch.uint8, device=device)
    copy_seconds, _, _ = timed(source.clone, 10, device)
    bandwidth = 2 * source.numel() / copy_seconds
    width = (rollout.prompt_tokens + rollout.completion_tokens).float().mean() * dtype.itemsize
    cache_bytes = (
        sum(
            2 * args.rows * width * model.config.num_key_value_heads * grpo.head_size(model.config)
            for _ in model.base_model.layers
        )
        / 2
    )  # half full on average
    floor = steps * float(parameters * dtype.itemsize + cache_bytes) / bandwidth
    row(
        f"floor: weights, keys and values at {bandwidth / 1e9:,.0f} GB/s",
        int(rollout.completion_tokens.sum()),
        floor,
        float("nan"),
        base,
    )
    model.grpo_decoder = None

    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(
        {"use_reentrant": False}
    )
    optimizer = grpo.MasterAdamW(model, 1e-9)
    rollout.old_logprobs, rollout.advantages = rollout.sample_logprobs, torch.randn(args.rows, device=device)
    all_tokens = int((rollout.prompt_tokens + rollout.completion_tokens).sum())
    chunked = grpo.token_logprobs
    for name, logprobs, micro in (
        ("update, log-probabilities in chunks", chunked, args.micro_batch_tokens),
        ("update, all logits at once", full_logprobs, args.micro_batch_tokens),
        ("update, all logits, an eighth of the micro-batch", full_logprobs, args.micro_batch_tokens // 8),
    ):
        grpo.token_logprobs = logprobs
        cfg = grpo.make_config("none", micro_batch_tokens=micro, kl_coef=0.0)
        try:
            seconds, peak, _ = timed(
                lambda: grpo.update_policy(model, optimizer, rollout, cfg, 1e-9), args.repeats, device
            )
        except torch.cuda.OutOfMemoryError:
            print(f"{name:54}{'out of memory':>12}")
            continue
        if logprobs is chunked:
            update_seconds = seconds
        row(name, all_tokens, seconds, peak)
    grpo.token_logprobs = chunked
    whole = min(sample_seconds.values()) + update_seconds
    row("a GRPO step: sampling and one pass of updates", all_tokens, whole, float("nan"))
    if args.model is None and args.shape != "embedded" and (seconds := trl_step(model, args)):
        row("a step of TRL's GRPOTrainer", all_tokens, seconds, float("nan"))
    pairs = test_rewards.rows(test_rewards.EQUAL) + test_rewards.rows(test_rewards.DIFFERENT)
    seconds, _, _ = timed(
        lambda: [grpo.compare.__wrapped__(predicted, answer) for answer, predicted in pairs],
        args.repeats,
        device,
    )
    print(f"the grader, uncached: {1000 * seconds / len(pairs):.2f} ms a pair, {len(pairs)} pairs")


if __name__ == "__main__":
    main()
