"""Compares tests/fixtures/policy_loss.json with TRL's own GRPOTrainer._compute_loss, value and gradient.

TRL has the k3 estimator only, so cases with another one and a divergence are left out.

usage: python scripts/check_policy_loss_with_trl.py   (needs trl 1.16)
"""

import json
import os
from collections import defaultdict
from types import SimpleNamespace

import torch
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOTrainer


def padded(rows):
    return pad_sequence([torch.tensor(row, dtype=torch.float64) for row in rows], batch_first=True)


def stub(case, logps, chosen, longest):
    """What _compute_loss reads of its trainer; log-probs are those of the case."""
    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=False, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, torch.zeros_like(logps), None),
        get_high_entropy_mask=lambda *args: chosen,
        top_entropy_quantile=0.5,
        off_policy_mask_threshold=None,
        importance_sampling_level=case["level"],
        beta=case["beta"],
        loss_type=case["loss_type"],
        epsilon_low=case["epsilon"],
        epsilon_high=case["epsilon_high"],
        max_completion_length=longest,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        accelerator=accelerator,
        args=SimpleNamespace(use_bias_correction_kl=True, delta=case["delta"]),
        model=SimpleNamespace(training=False),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )


def check(case, longest):
    logps = padded(case["logps"]).requires_grad_()
    mask = padded([[1.0] * len(row) for row in case["logps"]])
    chosen = padded([[float(x) for x in row] for row in case["chosen"]])
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.tensor(case["advantages"], dtype=torch.float64),
        "old_per_token_logps": padded(case["sampled"]),
        "ref_per_token_logps": padded(case["reference"]),
        "num_items_in_batch": mask.sum(),
    }
    trainer = stub(case, logps, chosen, longest)
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    apart = abs(loss.item() - case["loss"])
    for row, want in zip(logps.grad, case["dlogps"]):
        apart = max(apart, (row[: len(want)] - torch.tensor(want)).abs().max().item())
    return apart


def main():
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with open(os.path.join(here, "tests", "fixtures", "policy_loss.json")) as file:
        fixture = json.load(file)
    cases = [c for c in fixture["cases"] if c["beta"] == 0 or c["kl_estimator"] == "k3"]
    worst = max(check(case, fixture["max_completion_length"]) for case in cases)
    print(f"{len(cases)} of {len(fixture['cases'])} cases: at most {worst:.1e} apart from TRL")


if __name__ == "__main__":
    main()
