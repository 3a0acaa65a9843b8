"""SYNC over real gloo processes: the mean over their shards is one process with everything."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from ghm_d2.losses import GHMCLoss, GHMRLoss
from tests import reference as ref
from tests.detectors import NUM_CLASSES, small_model

WORLDS = (2, 3)
SWITCHES = (
    {},
    {"momentum": 0.0, "normalize_by": "all_bins"},
    {"decay_empty_bins": True, "bias_correction": True, "loss_weight": "auto"},
)
KINDS = {
    "ghm_c": GHMCLoss,
    "ghm_c_softmax": partial(GHMCLoss, activation="softmax"),
    "ghm_r": GHMRLoss,
}
# Rows of each process for each call: one has none, one has few, all have none, all have some.
SHARES = ((20, 0, 7), (3, 17, 1), (0, 0, 0), (0, 1, 30))
BASE = ("ghm_retinanet_R_50", "MODEL.GHM.SYNC", True)
BASE += ("MODEL.GHM.RETINANET.IMAGES_PER_HISTOGRAM", 0)
SCOPES = ("level", "batch")
IMAGES = (2, 1, 3)  # of each process; those of the second one hold no object


def draw(kind, rng, rows):
    if kind == "ghm_r":
        return ref.draw_boxes(rng, rows, 10)
    activation = "softmax" if kind == "ghm_c_softmax" else "sigmoid"
    return ref.draw_logits(rng, rows, 3, 30, activation=activation)


def oracle(kind, switches):
    if kind == "ghm_r":
        return ref.ghm_r(**switches)
    activation = "softmax" if kind == "ghm_c_softmax" else "sigmoid"
    return ref.ghm_c(activation=activation, **switches)


def loss_calls(rank, world):
    """The calls of every loss in one process: {name: (losses, gradients, running counts)}."""
    found = {}
    for kind, make in KINDS.items():
        for number, switches in enumerate(SWITCHES):
            rng, loss_fn, losses, grads = (
                np.random.default_rng(10),
                make(sync=True, **switches),
                [],
                [],
            )
            for rows in SHARES:
                parts = [draw(kind, rng, n) for n in rows[:world]]
                x, target = (torch.tensor(a) for a in parts[rank])
                loss = loss_fn(x.requires_grad_(), target)
                loss.backward()
                losses.append(loss.detach())
                grads.append(x.grad)
            found[f"{kind}-{number}"] = (losses, grads, loss_fn.acc_sum)
    return found


def errors(world):
    """For each call, those of every process, of another size in each."""
    rng = np.random.default_rng(11)
    return [
        [
            rng.normal(0, 0.1 * (i + 1), (n, 4)).astype(np.float32)
            for i, n in enumerate(rows[:world])
        ]
        for rows in SHARES
    ]


def widths(rank, world):
    """mu of every call of a loss whose mu follows."""
    loss_fn, found = GHMRLoss("auto", sync=True), []
    for parts in errors(world):
        own = torch.tensor(parts[rank], requires_grad=True)
        loss_fn(own, torch.zeros_like(own)).backward()
        found.append(loss_fn.mu.item())
    return found


def detector_arguments(model, images):
    """What ``GHMRetinaNet.losses`` gets for images that count up from 0; the same in any shard."""
    generator = torch.Generator().manual_seed(3)
    sizes = (40, 12, 4, 2, 1)
    anchors = [
        Boxes(torch.rand(n, 4, generator=generator) + torch.tensor([0, 0, 5, 5])) for n in sizes
    ]
    total = sum(sizes)
    logits, deltas, labels, boxes = [], [], [], []
    for image in range(sum(IMAGES)):
        logits.append(torch.randn(total, NUM_CLASSES, generator=generator) * 3)
        deltas.append(torch.randn(total, 4, generator=generator))
        label = torch.randint(-1, NUM_CLASSES + 1, (total,), generator=generator)
        if IMAGES[0] <= image < IMAGES[0] + IMAGES[1]:
            label = torch.full((total,), NUM_CLASSES)
        labels.append(label)
        boxes.append(torch.rand(total, 4, generator=generator) + torch.tensor([0, 0, 6, 6]))

    def levels(tensors):
        stacked = torch.stack([tensors[i] for i in images])
        return [x.clone().requires_grad_() for x in stacked.split(sizes, dim=1)]

    kept = [labels[i] for i in images], [boxes[i] for i in images]
    return anchors, levels(logits), kept[0], levels(deltas), kept[1]


def detector_losses(scope, images, steps=2):
    """Losses, gradients (images, rows, .) and running counts after a few equal steps."""
    model = small_model(*BASE, "MODEL.GHM.RETINANET.SCOPE", scope)
    for _ in range(steps):
        anchors, logits, labels, deltas, boxes = detector_arguments(model, images)
        with EventStorage():
            losses = model.losses(anchors, logits, labels, deltas, boxes)
        sum(losses.values()).backward()
    grads = [torch.cat([x.grad for x in xs], dim=1) for xs in (logits, deltas)]
    counts = {k: v for k, v in model.state_dict().items() if k.endswith("acc_sum")}
    return {k: v.detach() for k, v in losses.items()}, grads, counts


def shard(rank):
    start = sum(IMAGES[:rank])
    return range(start, start + IMAGES[rank])


def process(rank, folder):
    """One of three processes; the first two are also a job of their own."""
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank < world:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world
            )
            found = loss_calls(rank, world) | {"widths": widths(rank, world)}
            for scope in SCOPES:
                found[scope] = detector_losses(scope, shard(rank))
            torch.save(found, folder / f"{world}-{rank}.pt")
            dist.barrier()  # nobody leaves while another still talks to it
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (folder,), nprocs=max(WORLDS))
    return {
        world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
        for world in WORLDS
    }


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("number", range(len(SWITCHES)))
@pytest.mark.parametrize("kind", KINDS)
def test_synced_losses_are_those_of_one_process(results, kind, number, world):
    found = [result[f"{kind}-{number}"] for result in results[world]]
    rng, expected = np.random.default_rng(10), oracle(kind, SWITCHES[number])
    for call, rows in enumerate(SHARES):
        parts = [draw(kind, rng, n) for n in rows[:world]]
        loss, grads = expected.pooled(parts)
        mean = sum(losses[call].item() for losses, _, _ in found) / world
        assert mean == pytest.approx(loss, rel=1e-5)
        for (_, own, _), grad in zip(found, grads, strict=True):
            # DistributedDataParallel divides by the number of processes
            np.testing.assert_allclose(own[call] / world, grad, rtol=1e-5, atol=1e-8)
    for _, _, counts in found:
        assert torch.equal(counts, found[0][2])
        np.testing.assert_allclose(counts, expected.counts.sums, rtol=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_a_following_mu_is_of_the_mean_of_the_medians(results, world):
    average, expected = None, []
    for parts in errors(world):
        medians = [np.sort(np.abs(x).ravel())[(x.size - 1) // 2] if x.size else 0 for x in parts]
        count = sum(x.size for x in parts)
        if count:
            median = sum(m * x.size for m, x in zip(medians, parts, strict=True)) / count
            average = median if average is None else 0.95 * average + 0.05 * median
        expected.append(min(max(1.5 * average, 0.01), 0.5))
    assert len(set(expected)) == 3
    for result in results[world]:
        assert result["widths"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("scope", SCOPES)
def test_synced_detectors_are_one_detector_with_all_images(results, scope, world):
    """The shards have 2, 1 and 3 images, and those of the second one hold no object."""
    found = [result[scope] for result in results[world]]
    losses, grads, counts = detector_losses(scope, range(sum(IMAGES[:world])))
    for name, loss in losses.items():
        assert loss > 0
        mean = sum(own[name] for own, _, _ in found) / world
        torch.testing.assert_close(mean, loss, rtol=1e-5, atol=0)
    for part, grad in enumerate(grads):
        own = torch.cat([own[part] for _, own, _ in found]) / world
        torch.testing.assert_close(own, grad, rtol=1e-5, atol=1e-8)
    for _, _, own in found:
        assert all(torch.equal(own[name], x) for name, x in counts.items())
