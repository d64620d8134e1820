"""How fast sampling and updates are on this machine, beside what else could be used: one table to paste into an issue.

    python tests/benchmark.py                               # CPU: the embedded model; GPU: the shape of Qwen2.5-0.5B
    python tests/benchmark.py --shape 1.5B --rows 512 2048  # completions at once; the first also makes the update
    python tests/benchmark.py --model runs/zero/final       # a checkpoint, on the problems of --data

Timings belong to idle machines: another process on the same cores or GPU makes them worthless, and the ratios too.
Shapes have random weights, as speed does not depend on them, and nothing is downloaded. Every figure is the median
of --repeats runs after one that is not counted. Columns:

    tokens/s  of the completions, each up to its end token, whether sampled or trained on
    ratio     of tokens/s to those of the first `generate` of as many rows; of a step, to those of TRL's step
    floor     of the seconds: the share that it takes to read the weights, and the keys and values of the rows still
              going, once a decoding step, at the bandwidth of a sweep over one tensor
    peak GB   on the GPU, with the weights; beside it the estimate by `memory_gb`, which chooses max_rows

A step is sampling and one pass of updates. Where trl is installed its GRPOTrainer takes one from the same weights.
"""

import argparse
import contextlib
import hashlib
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE, DTYPE = torch.device("cuda" if GPU else "cpu"), torch.bfloat16 if GPU else torch.float32
SHAPES = {  # hidden, FFN, layers, heads, key-value heads, vocabulary
    "embedded": None, "small": (128, 384, 4, 4, 2, 2_048), "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936), "3B": (2048, 11_008, 36, 16, 2, 151_936)}


def random_model(shape):
    """A Qwen2 of this shape, which hardly ever ends by itself, and a tokenizer of bytes: a letter is a token."""
    hidden, ffn, layers, heads, kv_heads, vocab = SHAPES[shape]
    config = Qwen2Config(vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True,
                         bos_token_id=None, eos_token_id=0, pad_token_id=0, max_position_embeddings=4096)
    alphabet, words = pre_tokenizers.ByteLevel.alphabet(), Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.train_from_iterator([""], trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet,
                                                        show_progress=False))
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    return model.eval(), PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")


def embedded_model(steps=60):
    """The embedded base model after a few steps of its training -> model, tokenizer, milliseconds of a batch."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for count in (5, 5, steps):  # the first is not counted; what is no step drops out of the difference
            started = time.perf_counter()
            path = grpo.build_base_model(Path(folder, f"base-{len(seconds)}"), steps=count)
            seconds.append(time.perf_counter() - started)
        model, tokenizer = grpo.load_model(str(path), DEVICE, DTYPE), grpo.load_tokenizer(str(path))
    return model, tokenizer, 1000 * (seconds[2] - seconds[1]) / (steps - 5)


def generate(model, tokenizer, prompts, args, cache):
    """`model.generate` of the same prompts, padded on the left, temperature and limit -> tokens of the completions."""
    encoded = [grpo.encode_prompt(tokenizer, prompt) for prompt in prompts for _ in range(args.group_size)]
    width, stops = max(map(len, encoded)), sorted(grpo.stop_token_ids(model, tokenizer))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in encoded], device=DEVICE)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=DEVICE)
    settings = GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=args.completion,
                                eos_token_id=stops, pad_token_id=stops[0], cache_implementation=cache)
    model.set_attn_implementation("sdpa")
    out = model.generate(ids, attention_mask=mask, generation_config=settings)[:, width:]
    ended = torch.isin(out, torch.tensor(stops, device=DEVICE))
    return int(torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1]).sum())


def trl_step(model, tokenizer, prompts, args, cfg):
    """Steps of TRL's GRPOTrainer on the same weights -> median seconds, tokens of a step; None without trl."""
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        return None
    seconds, tokens, began = [], [], time.perf_counter()

    def reward(completion_ids, **_):  # called once a step
        nonlocal began
        seconds.append(time.perf_counter() - began)
        tokens.append(sum(map(len, completion_ids)))
        began = time.perf_counter()
        return [float(len(ids) % 2) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as folder:
        model.set_attn_implementation("sdpa")
        model.save_pretrained(folder)
        rows, longest, group = args.rows[0], args.prompt + args.completion, args.group_size
        part = max(n for n in range(group, rows + 1, group) if rows % n == 0 and (
            n == group or n * longest <= cfg.micro_batch_tokens))  # whole groups, in as much memory as the update
        config = GRPOConfig(
            folder, max_steps=args.repeats + 2, num_generations=group, per_device_train_batch_size=part,
            gradient_accumulation_steps=rows // part, max_completion_length=args.completion, loss_type="grpo",
            gradient_checkpointing=cfg.gradient_checkpointing, bf16=GPU, use_cpu=not GPU, save_strategy="no",
            report_to=[], disable_tqdm=True, model_init_kwargs={"dtype": DTYPE})
        data = Dataset.from_dict({"prompt": prompts * (args.repeats + 2)})
        with contextlib.redirect_stdout(sys.stderr):  # its logs are no part of the table
            GRPOTrainer(folder, reward, config, data, processing_class=tokenizer).train()
    return statistics.median(seconds[2:]), statistics.median(tokens[2:])  # the first ones start and compile


def timed(function, repeats):
    """Median seconds, peak GB of GPU memory, the last result."""
    seconds = []
    for _ in range(repeats + 1):
        if GPU:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = function()
        if GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]), torch.cuda.max_memory_allocated() / 1e9 if GPU else None, result


def device_name():
    """The GPU and its memory, or the processor and how many of its threads are used."""
    if GPU:
        return f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB"
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{(names or [platform.machine()])[0]}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def floor_seconds(model, rollout, bandwidth):
    """The time to read all that a rollout has to read at least."""
    shape, steps = model.config, rollout.completion_tokens.double()
    cached = 2 * shape.num_hidden_layers * model.base_model.layers[0].self_attn.k_proj.out_features  # numbers a token
    looked_at = (steps * rollout.prompt_tokens + steps * (steps + 1) / 2).sum()  # tokens, over all steps and rows
    return float(steps.max() * model.num_parameters() + looked_at * cached) * DTYPE.itemsize / bandwidth


class Table:
    """Lines of one Markdown table; what is not known is a dash."""

    titles = ("", "rows", "tokens/s", "ratio", "seconds", "floor", "peak GB", "estimate")
    forms = ("{}", "{:,}", "{:,.0f}", "{:.2f}", "{:.2f}", "{:.0%}", "{:.2f}", "{:.2f}")

    def __init__(self):
        self.lines = ["| " + " | ".join(self.titles) + " |", "|---" + "|---:" * 7 + "|"]

    def add(self, *cells):
        cells = [form.format(cell) if cell is not None else "-" for form, cell in zip(self.forms, cells)]
        self.lines.append("| " + " | ".join(cells + ["-"] * (len(self.titles) - len(cells))) + " |")
        print(self.lines[-1], file=sys.stderr, flush=True)  # as it comes; the whole at the end


def measure_sampling(table, model, tokenizer, prompts, args, cfg, bandwidth):
    """Lines for `generate` and for `sample_completions` -> the last rollout, its seconds."""
    rows, base, weights = len(prompts) * args.group_size, None, model.num_parameters() * DTYPE.itemsize / 1e9
    for cache in ("dynamic", "static") if GPU else ("dynamic",):  # on a CPU static compiles for minutes
        try:
            seconds, peak, tokens = timed(lambda: generate(model, tokenizer, prompts, args, cache), args.repeats)
            base = base or tokens / seconds
            table.add(f"generate, {cache} cache", rows, tokens / seconds, tokens / seconds / base, seconds, None, peak)
        except torch.cuda.OutOfMemoryError:
            table.add(f"generate, {cache} cache: out of memory", rows)
    model.grpo_decoder = None
    model.set_attn_implementation("grouped")
    seconds, peak, rollout = timed(lambda: grpo.sample_completions(
        model, tokenizer, prompts, group_size=args.group_size, max_completion_tokens=args.completion), args.repeats)
    speed = int(rollout.completion_tokens.sum()) / seconds
    _, row = grpo.memory_gb(model, cfg, int(rollout.prompt_tokens.max()))
    table.add("sample_completions", rows, speed, speed / base if base else None, seconds,
              floor_seconds(model, rollout, bandwidth) / seconds, peak, weights + rows * row if GPU else None)
    model.grpo_decoder = None
    return rollout, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5B" if GPU else "embedded")
    parser.add_argument("--model", help="a checkpoint folder instead of a shape")
    parser.add_argument("--data", default="calculator", help="problems for it, and for the embedded model")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024] if GPU else [64, 256])
    parser.add_argument("--group_size", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128, help="tokens, of a shape")
    parser.add_argument("--completion", type=int, default=512 if GPU else 144, help="tokens at most")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)

    batch_ms, tiny = None, args.shape == "embedded" and not args.model or args.model and grpo.is_tiny(args.model)
    if args.model:
        model, tokenizer = grpo.load_model(args.model, DEVICE, DTYPE), grpo.load_tokenizer(args.model)
    elif tiny:
        model, tokenizer, batch_ms = embedded_model()
    else:
        model, tokenizer = random_model(args.shape)
    cfg = grpo.make_config("tiny" if tiny else "x", kl_coef=0.0, group_size=args.group_size, temperature=1.0,
                           eval_samples=args.group_size, max_completion_tokens=args.completion)
    prompts = ["".join(chr(97 + int(i)) for i in torch.randint(0, 26, (args.prompt,))) for _ in range(max(args.rows))]
    if args.model or tiny:
        problems = grpo.load_problems(args.data, whole=True)
        prompts = [cfg.template.replace("{question}", problem.question) for problem in problems]
    prompts = [prompts[i % len(prompts)] for i in range(max(args.rows) // args.group_size)]
    args.prompt = max(len(grpo.encode_prompt(tokenizer, prompt)) for prompt in prompts)
    size = 2**26 if GPU else 2**24  # of float32, each read and written
    bandwidth = 8 * size / timed(torch.zeros(size, device=DEVICE).neg_, 10)[0]
    head = (f"{device_name()}, {bandwidth / 1e9:,.0f} GB/s; torch {torch.__version__}, transformers "
            f"{transformers.__version__}, grpo.py {hashlib.sha256(Path(grpo.__file__).read_bytes()).hexdigest()[:8]}\n"
            f"{args.model or args.shape}: {model.num_parameters():,} weights, {DTYPE}; up to {args.prompt} + "
            f"{args.completion} tokens, groups of {args.group_size}, {args.repeats} runs")

    table, results = Table(), []
    for rows in args.rows:
        asked = prompts[: rows // args.group_size]
        try:
            results.append(measure_sampling(table, model, tokenizer, asked, args, cfg, bandwidth))
        except torch.cuda.OutOfMemoryError:
            table.add("sample_completions: out of memory", rows)
    rollout, sampling_seconds = results[0]
    rows, tokens = len(rollout.texts), int(rollout.completion_tokens.sum())
    try:
        trl = trl_step(model, tokenizer, prompts[: rows // args.group_size], args, cfg)
    except torch.cuda.OutOfMemoryError:
        trl = table.add("a step of TRL's GRPOTrainer: out of memory", rows)
    model.set_attn_implementation("grouped")

    model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = grpo.MasterAdamW(model, 1e-9)
    rollout.old_logprobs, rollout.advantages = rollout.sample_logprobs, torch.randn(rows, device=DEVICE)
    seconds, peak, _ = timed(lambda: grpo.update_policy(model, optimizer, rollout, cfg, 1e-9), args.repeats)
    training, _ = grpo.memory_gb(model, cfg, args.prompt)
    estimate = training + model.num_parameters() * DTYPE.itemsize / 1e9 if GPU else None
    table.add("update_policy", rows, tokens / seconds, None, seconds, None, peak, estimate)
    base, step = trl[1] / trl[0] if trl else None, sampling_seconds + seconds
    table.add("a GRPO step", rows, tokens / step, tokens / step / base if base else None, step)
    if trl:
        table.add("a step of TRL's GRPOTrainer", rows, base, 1.0, trl[0])
    if batch_ms:
        table.add(f"a pre-training batch: {batch_ms:.1f} ms")
    print("\n".join([head, "", *table.lines]))


if __name__ == "__main__":
    main()
