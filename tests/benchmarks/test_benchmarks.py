"""The benchmarks on inputs so small that only what they record can be checked, never the times."""

import json
import math
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage

from ghm_d2.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_losses  # noqa: E402
import bench_train_step  # noqa: E402
import cases  # noqa: E402
import check_oracle  # noqa: E402
import gradient_picture  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
import table  # noqa: E402

CPU = torch.device("cpu")

# What the loader must give a published file: a registry, weight_reduce_loss, nothing else.
FAKE = """
import torch
from mmdet.registry import MODELS
from .utils import weight_reduce_loss


@MODELS.register_module()
class GHMC(torch.nn.Module):
    def __init__(self, bins, momentum):
        super().__init__()

    def forward(self, pred, target, label_weight):
        kept = label_weight.sum()
        loss = pred.sum(1)
        return weight_reduce_loss(loss, label_weight, reduction="mean", avg_factor=kept)


@MODELS.register_module()
class GHMR(torch.nn.Module):
    def __init__(self, mu, bins, momentum):
        super().__init__()

    def forward(self, pred, target, label_weight):
        return weight_reduce_loss(pred - target, label_weight, avg_factor=pred.numel())
"""


@pytest.fixture
def no_download(monkeypatch):
    def refuse(folder):
        raise peers.PeerUnavailable("pip download failed: no network")

    monkeypatch.setattr(peers, "fetch_wheel", refuse)


def options(tmp_path: Path, *more: str) -> list[str]:
    words = "--device cpu --min-repeats 2 --max-repeats 2 --budget-s 0 --sizes 1600 16000 "
    words += "--regions 1 30 --region-size 1600 --coordinates 400 --images 1"
    return [*words.split(), "--output", str(tmp_path / "out" / "losses.json"), *more]


def test_losses_are_measured_recorded_drawn_and_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "mmdet_losses", lambda _: peers.load_ghm_losses(FAKE))
    monkeypatch.setattr(bench_losses, "IMAGE", (64, 64))
    bench_losses.main(options(tmp_path))
    result = json.loads((tmp_path / "out" / "losses.json").read_text())
    assert result["machine"]["cores"] >= 1 and result["machine"]["memory_gib"] > 0
    assert result["versions"]["torch"] == torch.__version__ and result["versions"]["fvcore"]
    assert {"date", "commit", "dirty", "settings"} <= result.keys()
    assert result["peers"] == {cases.MMDET: "measured"}
    cells = result["cells"]
    assert {c["suite"] for c in cells} == set(bench_losses.SUITES)
    for cell in cells:
        assert cell["status"] == "measured"
        assert 0 < cell["q1_s"] <= cell["median_s"] <= cell["q3_s"] and cell["repeats"] == 2
    of_size = {c["row"]: c for c in cells if c["suite"] == "sizes" and c["examples"] == 1600}
    assert {cases.FLOOR, cases.FUSED, cases.EAGER, cases.EXACT, cases.MMDET} <= of_size.keys()
    assert len(of_size) == 10  # with BCE and four kinds of focal loss
    floor = of_size[cases.FLOOR]
    assert floor["times_floor"] == 1 and floor["peak_extra_bytes"] == 0
    fused = of_size[cases.FUSED]
    assert math.isclose(fused["times_floor"], fused["median_s"] / floor["median_s"])
    assert fused["peak_times_predictions"] == fused["peak_extra_bytes"] / 6400 >= 1
    assert {k["dtype"] for k in result["kernels"]} == {"float32", "float16", "bfloat16"}
    assert all((tmp_path / "out" / f"losses.{x}").stat().st_size > 5000 for x in ("png", "svg"))
    printed = capsys.readouterr().out
    assert all(row in printed for row in of_size)
    assert str(tmp_path) not in json.dumps(result)


def test_a_peer_that_cannot_be_fetched_is_left_out_with_the_reason(tmp_path, no_download, capsys):
    result = bench_losses.run(CPU, bench_losses.parse(options(tmp_path, "--suites", "ghm_r")))
    assert result["peers"][cases.MMDET] == "left out: pip download failed: no network"
    assert "no network" in capsys.readouterr().err
    assert cases.MMDET not in {c["row"] for c in result["cells"]}
    assert cases.FUSED in {c["row"] for c in result["cells"]}


def small_case(scale: float) -> cases.Case:
    make = lambda: cases.Logits([20], CPU, torch.float32)  # noqa: E731
    return cases.Case("sizes", "x", 1600, 30, scale, make, [cases.FUSED, cases.EAGER])


LIMITS = Namespace(limit_s=10.0, budget_s=0, min_repeats=1, max_repeats=1)


def before(scale: float, seconds: float, peak: float = 1.0) -> dict:
    return {"scale": scale, "median_s": seconds, "peak_times_predictions": peak}


@pytest.mark.parametrize(
    "smaller, predicted",
    [
        ([], None),
        ([before(10, 1.0)], None),  # 10 s: at the limit, not above it
        ([before(10, 1.1)], 11.0),
        ([before(5, 1.0), before(10, 1.0)], None),  # hardly depends on the scale
        ([before(5, 1.0), before(10, 2.0)], 20.0),
        ([before(5, 12.0), before(10, 11.0)], 11.0),  # never predicted to fall
    ],
)
def test_what_is_predicted_to_take_too_long_is_skipped_and_marked(smaller, predicted):
    history = {("sizes", cases.EAGER): list(smaller)}
    records = bench_losses.run_case(small_case(100), CPU, None, history, LIMITS)
    by_row = {r["row"]: r for r in records}
    assert by_row[cases.FUSED]["status"] == "measured"
    eager = by_row[cases.EAGER]
    if predicted is None:
        assert eager["status"] == "measured"
        assert history["sizes", cases.EAGER][-1] is eager
    else:
        assert eager["status"] == "skipped" and "median_s" not in eager
        assert eager["predicted_s"] == pytest.approx(predicted)
        assert f"{predicted:.1f} s" in eager["reason"]
        assert history["sizes", cases.EAGER] == smaller
        assert f"skipped: {eager['reason']}" in table.cells_table(records)


def test_what_does_not_fit_in_memory_is_skipped(monkeypatch):
    monkeypatch.setattr(measure, "available_bytes", lambda _: 1 << 20)
    history = {("sizes", cases.EAGER): [before(10, 1e-6, peak=1000.0)]}
    records = bench_losses.run_case(small_case(20), CPU, None, history, LIMITS)
    assert "more than is free" in records[-1]["reason"]


def test_peak_memory_counts_to_the_byte():
    kept = []

    def call():
        a = torch.empty(1000)
        del a
        b = torch.empty(3000)
        c = torch.empty(500, dtype=torch.float64)
        del b
        kept.append(torch.empty(2000, dtype=torch.uint8))
        return c

    threads = torch.get_num_threads()
    assert measure.peak_extra_bytes(call, CPU) == 4 * 3000 + 8 * 500
    assert measure.peak_extra_bytes(lambda: None, CPU) == 0
    assert torch.get_num_threads() == threads


def test_calls_take_turns_and_stop_after_their_repeats():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = measure.time_interleaved(
        calls, CPU, budget_s=1e9, min_repeats=2, max_repeats=4, warmups=1
    )
    assert order == ["a", "b"] + ["a", "b", "b", "a"] * 2
    assert [len(x) for x in seconds.values()] == [4, 4]
    seconds = measure.time_interleaved(calls, CPU, budget_s=0, min_repeats=3, warmups=0)
    assert [len(x) for x in seconds.values()] == [3, 3]


def test_bootstrap_is_paired():
    drift = [1.0, 5.0, 2.0, 9.0, 3.0]
    found = measure.bootstrap_ratio([2 * x for x in drift], drift)
    assert found == {"ratio": 2.0, "low": 2.0, "high": 2.0}
    apart = measure.bootstrap_ratio(drift, list(reversed(drift)))
    assert apart["low"] < apart["ratio"] == 1.0 < apart["high"]


def test_published_file_runs_with_stand_ins_that_leave_no_trace():
    names = set(sys.modules)
    module = peers.load_ghm_losses(FAKE)
    assert set(sys.modules) == names
    pred = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    loss = module.GHMC(30, 0.75)(pred, torch.zeros(2), torch.tensor([1.0, 0.0]))
    assert loss == 3
    assert module.GHMR(0.02, 10, 0.7)(pred, pred - 1, torch.ones(2, 2)) == 1


def test_ignored_anchors_have_weight_zero_for_the_peer():
    inputs = cases.Logits([1000], CPU, torch.float32)
    seen = []

    class Peer(torch.nn.Module):
        def forward(self, pred, target, label_weight):
            seen.extend([target, label_weight])
            return pred.sum()

    inputs._mmdet(Peer())()
    labels = inputs.labels[0]
    assert (labels == -1).any()
    assert torch.equal(seen[1] == 0, labels == -1)
    assert torch.equal(seen[0], torch.where(labels == -1, cases.CLASSES, labels))


def test_a_wheel_with_another_checksum_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / peers.WHEEL, "w") as archive:
        archive.writestr(peers.MEMBER, FAKE)
    with pytest.raises(peers.PeerUnavailable, match="sha256"):
        peers.mmdet_losses(tmp_path)


def test_eager_row_takes_the_eager_path_and_gives_the_same_gradient():
    inputs = cases.Logits([500], CPU, torch.float32)
    calls = inputs.calls(30, None)
    fused, eager = calls[cases.FUSED](), calls[cases.EAGER]()
    used = []
    original = cases.ghm_c.sigmoid_kernel
    cases.ghm_c.sigmoid_kernel = lambda *a: used.append(1) or original(*a)
    try:
        (slow,) = eager()
        assert not used
        (fast,) = fused()
        assert used
    finally:
        cases.ghm_c.sigmoid_kernel = original
    torch.testing.assert_close(slow, fast, rtol=1e-5, atol=1e-9)


def test_levels_of_a_real_image():
    # 800 x 1333 at strides 8 to 128, rounded up, 9 anchors a place.
    assert cases.anchors_of_levels(800, 1333) == [150300, 37800, 9450, 2457, 693]


def test_training_step_of_both_detectors(tmp_path):
    path = tmp_path / "steps.json"
    words = "--device cpu --width 4 --size 64 96 --rounds 2 --boxes 2"
    bench_train_step.main([*words.split(), "--output", str(path)])
    result = json.loads(path.read_text())
    assert set(result["models"]) == {"retinanet", "faster_rcnn"}
    for model in result["models"].values():
        assert model["inference"]["same_detections"] is True
        for phase in ("train", "inference"):
            ratio = model[phase]["time_ghm_over_stock"]
            assert 0 < ratio["low"] <= ratio["high"]
            for name in ("stock", "ghm"):
                assert len(model[phase][name]["seconds"]) == 2
                assert model[phase][name]["peak_extra_bytes"] > 0
    assert result["models"]["retinanet"]["train"]["memory_ghm_over_stock"] < 1
    assert "output" not in result["settings"]


def test_every_loss_call_of_a_step_is_watched_for_host_synchronisation(monkeypatch):
    def waits(call):
        call()
        return "waited"

    monkeypatch.setattr(measure, "host_sync", waits)
    words = "--device cpu --width 4 --size 64 96 --boxes 2"
    args = bench_train_step.parse(words.split())
    model = bench_train_step.build_pair("retinanet", args)["ghm"]
    step = bench_train_step.train_step(model, bench_train_step.batch_of(args))
    with EventStorage():
        assert bench_train_step._host_syncs(model, step) == ["waited"] * 2  # one call of each loss
        assert all("_forward" not in vars(module) for module in model.modules())


def test_losses_equal_the_oracle_on_fresh_inputs(tmp_path, capsys):
    check_oracle.main(["--device", "cpu", "--output", str(tmp_path / "oracle.json")])
    result = json.loads((tmp_path / "oracle.json").read_text())
    assert len(result["checks"]) == 6 and all(c["good"] for c in result["checks"])
    assert f"seed {result['seed']}" in capsys.readouterr().out


def test_a_loss_that_differs_from_the_oracle_fails(monkeypatch, capsys):
    original = check_oracle.GHMRLoss.forward
    monkeypatch.setattr(
        check_oracle.GHMRLoss, "forward", lambda self, *a: original(self, *a) * 1.0001
    )
    with pytest.raises(SystemExit) as exit_info:
        check_oracle.main(["--device", "cpu"])
    assert exit_info.value.code == 1
    assert capsys.readouterr().out.count("TOO FAR") == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("script", [bench_losses, bench_train_step])
def test_a_missing_gpu_is_one_sentence(script):
    with pytest.raises(UserError, match="no CUDA device"):
        script.main(["--device", "cuda"])


def test_the_picture_of_what_ghm_does(tmp_path):
    """It is drawn from its records, in which each loss's shares are a whole."""
    shares = gradient_picture._read(gradient_picture.RECORDS / "gradient_contribution.csv")
    assert [round(float(shares[name].sum()), 6) for name in ("CE", "focal", "GHM-C")] == [1, 1, 1]
    files = gradient_picture.draw(gradient_picture.RECORDS, tmp_path / "picture")
    assert [file.suffix for file in files] == [".png", ".svg"]
    # What the README says of the picture: the easiest tenth decides with cross entropy alone.
    easiest = {name: float(shares[name][:3].sum()) for name in ("CE", "focal", "GHM-C")}
    assert easiest["CE"] > 0.8 and easiest["focal"] < 0.3 and easiest["GHM-C"] < 0.02
