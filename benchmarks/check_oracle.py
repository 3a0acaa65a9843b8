"""Compares the losses with the tests' float64 oracle on random inputs of a fresh seed.

    python benchmarks/check_oracle.py --device cuda --output oracle_cuda.json

A gradient norm within a rounding step of a region's edge may fall on either side of it, so inputs
are drawn anew until no norm is that close.
"""

import argparse
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch

from ghm_d2.errors import exits_with_one_sentence
from ghm_d2.files import write_json
from ghm_d2.losses import GHMCLoss, GHMRLoss
from ghm_d2.provenance import describe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import reference

MU = 0.02
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
MARGIN = 1e-6  # in gradient norm; float32 is off by a tenth of it


def _far_from_edges(norm: np.ndarray, bins: int) -> np.ndarray:
    return np.abs(norm * bins - np.round(norm * bins)) > MARGIN * bins


def check(
    make: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]],
    examples: Callable[..., reference.Examples],
    module: torch.nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    rng: np.random.Generator,
) -> dict[str, float | bool]:
    """Three training calls of `module` and of the oracle on the same inputs.

    Args:
        make: draws (predictions, labels or targets).
        examples: the oracle's.
        module: GHMCLoss or GHMRLoss.
        device: where `module` runs.
        dtype: of the predictions.
        rng: what to draw from.

    Returns:
        The largest relative errors of loss and gradient, and whether they are small enough.
    """
    bins = module.bins
    oracle = reference.GHMReference(examples, bins=bins, momentum=module.momentum)
    module.to(device)
    loss_error = gradient_error = 0.0
    for _ in range(3):
        predictions, others = make(rng)
        x = torch.from_numpy(predictions).to(dtype)
        for _ in range(20):
            near = ~_far_from_edges(examples(x.double().numpy(), others).gradient_norm, bins)
            if not near.any():
                break
            fresh = torch.from_numpy(make(rng)[0]).to(dtype)
            x = torch.where(torch.from_numpy(near), fresh, x)
        expected, gradients = oracle.pooled([(x.double().numpy(), others)])
        x = x.to(device).requires_grad_()
        loss = module(x, torch.from_numpy(others).to(device))
        loss.backward()
        got = x.grad.double().cpu().numpy()
        loss_error = max(loss_error, abs(loss.item() - expected) / abs(expected))
        scale = np.abs(gradients[0]).max()
        gradient_error = max(gradient_error, float(np.abs(got - gradients[0]).max() / scale))
    good = loss_error <= 1e-5 and gradient_error <= TOLERANCE[dtype]
    return {"loss_error": loss_error, "gradient_error": gradient_error, "good": good}


def _logits(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(-2, 3, (2000, 20)), rng.integers(-1, 21, 2000)


def _deltas(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    target = rng.normal(0, 0.3, (5000, 4)).astype(np.float32)
    return target + rng.normal(0, 0.05, target.shape), target


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks both losses in every dtype; exits with 1 where one is too far off."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--seed", type=int, help="default: a random one, which is recorded")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    device = measure.choose_device(args.device)
    seed = secrets.randbits(32) if args.seed is None else args.seed
    rng = np.random.default_rng(seed)
    result: dict[str, Any] = describe(device) | {"seed": seed, "checks": []}
    for dtype, limit in TOLERANCE.items():
        for name, make, examples, module in (
            ("GHM-C", _logits, reference.sigmoid_examples, GHMCLoss(30, 0.75)),
            ("GHM-R", _deltas, _asl1, GHMRLoss(MU, 10, 0.7)),
        ):
            found = check(make, examples, module, device, dtype, rng)
            kind = str(dtype).removeprefix("torch.")
            result["checks"].append({"loss": name, "dtype": kind, "limit": limit} | found)
            print(
                f"{name} {kind:9} loss off by {found['loss_error']:.1e}, gradient by "
                f"{found['gradient_error']:.1e} (limit {limit:g}): "
                f"{'good' if found['good'] else 'TOO FAR'}"
            )
    print(f"seed {seed}, {device.type}")
    if args.output:
        write_json(args.output, result)
    if not all(c["good"] for c in result["checks"]):
        sys.exit(1)


def _asl1(pred: np.ndarray, target: np.ndarray) -> reference.Examples:
    return reference.asl1_examples(pred, target, mu=MU)


if __name__ == "__main__":
    with exits_with_one_sentence("check_oracle.py"):
        main()
