"""What could be gained by consuming the head's (N, A*K, H, W) logits where they lie?

    python benchmarks/bench_layout.py --output benchmarks/results/bench_layout_cpu.json

Detectron2 transposes them to (N, H*W*A, K) before the loss, and back in the backward pass. This
measures that transposition, forward and backward, against a whole training step of the same model
and image: the most that a loss without it could save.
"""

import statistics
from collections.abc import Sequence

import torch
from bench_train_step import GHM, batch_of, build_pair, parse, train_step
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.utils.events import EventStorage
from measure import time_interleaved

from ghm_d2.errors import UserError, exits_with_one_sentence
from ghm_d2.files import write_json
from ghm_d2.provenance import describe


def main(arguments: Sequence[str] | None = None) -> None:
    """Takes the options of bench_train_step.py."""
    args = parse(arguments)
    if args.output is None:
        raise UserError("--output FILE is missing.")
    device = torch.device(args.device)
    model, inputs = build_pair("retinanet", args)[GHM], batch_of(args)
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(inputs).tensor)
        maps = model.head([features[f] for f in model.head_in_features])[0]
    maps = [x.detach().requires_grad_() for x in maps]
    gradients = [torch.rand_like(permute_to_N_HWA_K(x, model.num_classes)) for x in maps]

    def transpose() -> None:
        for x, gradient in zip(maps, gradients, strict=True):
            x.grad = None
            permute_to_N_HWA_K(x, model.num_classes).backward(gradient)

    calls = {"step_s": train_step(model, inputs), "transpose_s": transpose}
    rounds = {"budget_s": 0, "min_repeats": args.rounds, "max_repeats": args.rounds}
    with EventStorage():
        seconds = time_interleaved(calls, device, **rounds)
    share = statistics.median(seconds["transpose_s"]) / statistics.median(seconds["step_s"])
    result = {
        "image": list(args.size),
        "logits": sum(x.numel() for x in maps),
        **seconds,
        "share_of_step": share,
        "device": device.type,
        **describe(device),
    }
    write_json(args.output, result)
    print(f"the transposition takes {100 * share:.2f} % of a training step")


if __name__ == "__main__":
    with exits_with_one_sentence("bench_layout.py"):
        main()
