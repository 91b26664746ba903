"""Writes tests/fixtures/policy_loss.json: losses and gradients of the GRPO family by autograd.

The formula is that of TRL's GRPOTrainer, written out below over one step's completions; inputs and
expected numbers stand side by side in the file, which `train::loss` is tested against.

usage: python scripts/policy_loss_fixture.py   (needs torch)
"""

import itertools
import json
import os

import torch

LENGTHS = [5, 3, 7, 1]
MAX_COMPLETION_LENGTH = 8


def inputs(seed):
    """Log-probs of a step's completions, their advantages, and which tokens the objective counts."""
    torch.manual_seed(seed)
    sampled = [-torch.rand(n, dtype=torch.float32) * 3 - 0.05 for n in LENGTHS]
    logps = [(x + 0.4 * torch.randn(len(x))).clamp(max=-0.01).float() for x in sampled]
    reference = [(x + 0.3 * torch.randn(len(x))).clamp(max=-0.01).float() for x in sampled]
    chosen = [torch.rand(n) < 0.7 for n in LENGTHS]
    return sampled, logps, reference, torch.randn(len(LENGTHS)).tolist(), chosen


def loss(case, logps, sampled, reference, advantages, chosen):
    """The step's loss; `logps` are doubles that require gradients."""
    tokens, total = sum(LENGTHS), 0.0
    for new, old, ref, advantage, counts in zip(logps, sampled, reference, advantages, chosen):
        log_weight = new - old
        if case["level"] == "sequence":
            log_weight = log_weight.mean().expand(len(new))
        ratio = torch.exp(log_weight)
        if case["loss_type"] == "cispo":
            term = -torch.clamp(ratio, max=case["epsilon_high"]).detach() * advantage * new
        else:
            clipped = torch.clamp(ratio, 1 - case["epsilon"], 1 + case["epsilon_high"])
            capped = ratio if case["delta"] is None else torch.clamp(ratio, max=case["delta"])
            term = -torch.min(capped * advantage, clipped * advantage)
        term = term * counts
        if case["beta"]:
            apart = ref - new
            kl = torch.exp(apart) - apart - 1 if case["kl_estimator"] == "k3" else apart**2 / 2
            term = term + case["beta"] * kl * ratio
        parts = {
            "grpo": len(LENGTHS) * len(new),
            "dapo": tokens,
            "cispo": tokens,
            "dr_grpo": len(LENGTHS) * MAX_COMPLETION_LENGTH,
        }
        total = total + term.sum() / parts[case["loss_type"]]
    return total


def main():
    cases = []
    settings = itertools.product(["grpo", "dapo", "dr_grpo", "cispo"], ["token", "sequence"], [None, 1.1])
    for i, (loss_type, level, delta) in enumerate(settings):
        sampled, logps, reference, advantages, chosen = inputs(i)
        case = {
            "loss_type": loss_type,
            "level": level,
            "epsilon": 0.2,
            "epsilon_high": 1.3 if loss_type == "cispo" else 0.28,
            "delta": delta,
            "beta": [0.0, 0.04][i // 2 % 2],
            "kl_estimator": ["k3", "k2"][i // 4 % 2],
        }
        variables = [x.double().requires_grad_() for x in logps]
        doubles = [[x.double() for x in part] for part in (sampled, reference)]
        value = loss(case, variables, *doubles, advantages, chosen)
        value.backward()
        cases.append(
            {
                **case,
                "logps": [x.tolist() for x in logps],
                "sampled": [x.tolist() for x in sampled],
                "reference": [x.tolist() for x in reference],
                "chosen": [x.tolist() for x in chosen],
                "advantages": advantages,
                "loss": value.item(),
                "dlogps": [x.grad.tolist() for x in variables],
            }
        )
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.path.join(here, "tests", "fixtures", "policy_loss.json")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        json.dump({"max_completion_length": MAX_COMPLETION_LENGTH, "cases": cases}, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
