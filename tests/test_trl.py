"""The README's script for TRL runs as it stands there, and TRL's own loss is ours: an oracle that others wrote."""

import re
from pathlib import Path

import pytest
import torch

import grpo


def test_the_readmes_script_runs_a_step_and_trls_loss_is_ours(tmp_path, monkeypatch, random_rollout):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    readme = Path(grpo.__file__).with_name("README.md").read_text(encoding="utf-8")
    script = next(code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "GRPOTrainer" in code)
    monkeypatch.chdir(tmp_path)
    grpo.build_base_model(Path("runs/zero/final"), steps=2, width=32)
    grpo.write_problems(Path("problems.jsonl"), grpo.load_problems("calculator")[:20])
    small = dict(max_completion_length=12, gradient_accumulation_steps=1, steps_per_generation=1, max_steps=1,
                 logging_steps=1, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True)
    config = trl.GRPOConfig
    monkeypatch.setattr(trl, "GRPOConfig", lambda *args, **given: config(*args, **{**given, **small}))
    exec(script, names := {})
    trainer, rollout = names["trainer"], random_rollout(vocab=150)
    assert 0 <= trainer.state.log_history[0]["rewards/accuracy/mean"] <= 1
    assert grpo.load_model("runs/trl", "cpu", torch.float32).num_parameters() > 10_000  # and this file reads it
    trainer.beta, model = 0.1, trainer.model.eval()
    mask, logprobs = rollout.completion_mask, grpo.token_logprobs(model, rollout, 1.0)
    old, ref = logprobs.detach() + 0.2 * (rollout.old_logprobs + 1), logprobs.detach() - 0.3  # ratios 0.8 to 1.2
    heads, tails = torch.zeros(6, 8, dtype=torch.long), torch.zeros(mask.shape, dtype=torch.long)
    for b, (ids, p, c) in enumerate(zip(rollout.ids, rollout.prompt_tokens, rollout.completion_tokens)):
        heads[b, 8 - p :], tails[b, :c] = ids[:p], ids[p : p + c]  # prompts are padded on the left
    inputs = dict(prompt_ids=heads, prompt_mask=heads.sign(), completion_ids=tails, completion_mask=mask.long(),
                  old_per_token_logps=old, ref_per_token_logps=ref, advantages=rollout.advantages)
    for trainer.loss_type, average in (("grpo", "sequence"), ("dapo", "token"), ("dr_grpo", "constant")):
        weights = grpo.loss_weights(mask, average, 12)
        ours, _ = grpo.grpo_loss(logprobs, old, ref, rollout.advantages, mask, weights, kl_coef=0.1)
        both = [(loss, torch.autograd.grad(loss, model.lm_head.weight, retain_graph=True)[0])
                for loss in (ours, trainer._compute_loss(model, inputs | {"num_items_in_batch": mask.sum()}))]
        torch.testing.assert_close(both[1], both[0], atol=1e-5, rtol=0)
