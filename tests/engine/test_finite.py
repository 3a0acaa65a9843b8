"""A NaN anywhere stops training: one sentence, good weights, a batch that can be replayed."""

import logging
import signal
from unittest.mock import Mock

import pytest
import torch
from detectron2.engine import AMPTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from ghm_d2.cli import replay
from ghm_d2.data import check_coco_dataset, parse_dataset, register_coco_dataset
from ghm_d2.engine import GHMTrainer
from ghm_d2.engine.finite import NotFiniteError
from ghm_d2.engine.preemption import Preempted, StopOnSignal
from ghm_d2.engine.process_end import end_process
from ghm_d2.engine.replay import load_replay
from ghm_d2.engine.settings import change
from ghm_d2.engine.setup import build_config
from ghm_d2.errors import exits_with_one_sentence
from tests.detectors import small_config
from tests.kinds import KINDS, Kind
from tests.tiny import forget_program, tiny_pairs, write_coco


@pytest.fixture(autouse=True)
def clean_up():
    yield
    forget_program()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


yaml_alone = pytest.mark.parametrize("kind", ["yaml"], indirect=True)


@pytest.fixture
def make(kind, tmp_path):
    """A trainer on six small images."""
    data = f"finite={write_coco(tmp_path)}"

    def run(heads="", amp=False, **values):
        config = Kind(kind, tmp_path, heads)
        values = {"output": tmp_path / "out", "max_iter": 4, "period": 1} | values
        cfg, _ = build_config(config.file, config.overrides(**values), [data], log_to_file=False)
        change(cfg, "amp", amp)  # which a config cannot ask for without a GPU
        return GHMTrainer(cfg)

    return run


def spoil(trainer, iteration, change):
    """Runs `change(batch)` before the forward pass of one iteration."""

    def before(model, inputs):
        if trainer.iter == iteration and model.training:
            change(inputs[0])

    trainer.model.register_forward_pre_hook(before, prepend=True)


def stops(trainer, error=NotFiniteError):
    with pytest.raises(error) as stop:
        trainer.train()
    assert "\n" not in str(stop.value)
    return str(stop.value)


def nan_image(batch):
    batch[0]["image"] = torch.full_like(batch[0]["image"], torch.nan, dtype=torch.float32)


def replayed(message, capsys):
    """What the tool prints for the file that the message names, and its exit code."""
    words = message.split(" replay ")[1].rstrip(".").split(" ")
    with pytest.raises(SystemExit) as stop:
        replay.main(words)
    return capsys.readouterr().out, stop.value.code


def finite_checkpoints(folder):
    files = sorted(folder.glob("model_*.pth"))
    for file in files:
        state = torch.load(file, weights_only=False)["model"]
        assert all(torch.isfinite(x).all() for x in state.values())
    return [file.name for file in files]


def test_nan_in_an_image_stops_before_the_step(make, tmp_path, capsys):
    trainer = make()
    spoil(trainer, 2, nan_image)
    message = stops(trainer)
    assert message.startswith("iteration 2: logits must be finite")
    for word in (
        "P3",
        "P7",
        "first loss: ghm_c.0 P3",
        "images ",
        ".png",
        "model_0000001.pth, is intact",
    ):
        assert word in message
    assert finite_checkpoints(tmp_path / "out") == ["model_0000000.pth", "model_0000001.pth"]
    assert all(torch.isfinite(x).all() for x in trainer.model.state_dict().values())
    text, code = replayed(message, capsys)
    assert code == 1
    table = [line.split() for line in text.splitlines()]
    bad = {row[1] for row in table if "NOT" in row and row[0] == "level"}
    assert bad == {"P3", "P4", "P5", "P6", "P7"}
    assert any(row[:1] == ["image"] and "NOT" in row for row in table)
    assert any(row[:1] == ["weights"] and "ok" in row for row in table)
    assert "first output: backbone.bottom_up.stem.conv" in text


def test_one_spoiled_level_is_named(make, capsys):
    trainer = make()
    level = trainer.model.backbone.fpn_output5

    def spoil_p5(module, inputs, output):
        return output * torch.nan if trainer.iter == 1 else output

    level.register_forward_hook(spoil_p5)
    message = stops(trainer)
    levels = message.split("predictions at ")[1].split(" not finite")[0].split(", ")
    assert levels in (["P5"], ["P5", "P6", "P7"])  # where P6 is made of P5
    assert "backbone.fpn_output5" in message


def test_a_refused_label_is_saved_too(make, capsys):
    trainer = make()

    def wrong(batch):
        batch[1]["instances"].gt_classes[0] = 7

    spoil(trainer, 1, wrong)
    message = stops(trainer)
    assert "iteration 1: labels must lie in [-1, 3]" in message and "ghm_c.0 P" in message
    text, code = replayed(message, capsys)
    assert code == 1 and "classes" in text and " to 7" in text


def test_the_replay_is_the_same_forward_pass(make, monkeypatch, tmp_path):
    """Counts, normalizer, weights and random numbers: losses come back bit for bit."""
    trainer = make("boxes")
    seen = {}

    def after(model, inputs, losses):
        if trainer.iter == 2:
            seen.update({k: v.detach().clone() for k, v in losses.items()})
            return {k: v * torch.inf for k, v in losses.items()}

    trainer.model.register_forward_hook(after, prepend=True)
    message = stops(trainer)
    assert "loss_rpn_loc is inf" in message
    replay = load_replay(next((tmp_path / "out" / "not_finite").glob("*.pth")))
    model = replay.build(trusted=True)
    replay.state.restore(model)
    with torch.no_grad(), EventStorage():
        again = model(replay.batch)
    assert again.keys() == seen.keys() and all(torch.equal(again[k], v) for k, v in seen.items())


def test_a_gradient_stops_without_amp_and_is_left_to_the_scaler_with_it(make, monkeypatch):
    trainer = make()
    weight = trainer.model.head.bbox_pred.weight
    weight.register_hook(lambda g: g * (torch.nan if trainer.iter == 1 else 1))
    message = stops(trainer)
    assert "iteration 1: 1 gradients are not finite, the first that of head.bbox_pred" in message
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())

    check = trainer._trainer.check
    check._precision = torch.float16
    weight.grad.fill_(torch.inf)
    check._losses = {"loss": torch.zeros(())}
    check.after_backward()
    check._precision = None
    with pytest.raises(NotFiniteError):
        check.after_backward()
    weight.grad.fill_(3e38)
    with pytest.raises(NotFiniteError, match="overflow when they are added up"):
        check.after_backward()
    weight.grad.fill_(1e25)  # its square is infinite
    check.after_backward()


def test_under_amp_the_check_knows_it(make):
    trainer = make(amp=True)
    assert isinstance(trainer._trainer, AMPTrainer)
    assert trainer._trainer.check._precision == torch.float16


def test_weights_that_overflow_are_never_written(make, tmp_path):
    trainer = make()
    trainer.optimizer.register_step_post_hook(
        lambda *_: (
            trainer.model.head.cls_score.weight.data.fill_(torch.inf) if trainer.iter == 1 else None
        )
    )
    message = stops(trainer)
    assert "weights or buffers that are not finite, the first head.cls_score.weight" in message
    assert finite_checkpoints(tmp_path / "out") == ["model_0000000.pth"]


def test_other_errors_pass_unchanged(make, tmp_path):
    trainer = make()

    def fail(batch):
        raise KeyError("image")

    spoil(trainer, 1, fail)
    with pytest.raises(KeyError):
        trainer.train()
    assert not (tmp_path / "out" / "not_finite").exists()


def test_a_full_disk_does_not_hide_the_cause(make, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "not_finite").write_text("in the way")
    trainer = make()
    spoil(trainer, 0, nan_image)
    message = stops(trainer)
    assert "the batch could not be saved" in message and "no checkpoint exists" in message


def test_no_traceback_and_an_exit_code_of_its_own(make, caplog, capsys, monkeypatch):
    for name in ("detectron2", "ghm_d2"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    trainer = make()
    spoil(trainer, 0, nan_image)
    with pytest.raises(SystemExit) as stop, exits_with_one_sentence("train_net.py"):
        trainer.train()
    assert stop.value.code == 3
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.out + caplog.text


def test_replay_refuses_other_files(tmp_path, capsys):
    torch.save({"model": {}}, tmp_path / "x.pth")
    for words in ([str(tmp_path / "x.pth")], [str(tmp_path / "gone.pth")], []):
        with pytest.raises(SystemExit) as stop:
            replay.main(words)
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("ghm-d2 replay: error: ")


ALIASES = "\n".join(["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)])
DAMAGE = {
    "config": [
        5, "", "5", "a: [", "[" * 100_000, "x: " * 5000, ALIASES, "MODEL: 5", "UNKNOWN: 5",
        "MODEL: {META_ARCHITECTURE: Nonsense}", "MODEL: {RESNETS: {STEM_OUT_CHANNELS: 1000000}}",
        "MODEL: {RESNETS: {RES2_OUT_CHANNELS: 1000000}}",
    ],
    "python": [5, True],
    "batch": [5, None, "x", [5], [{}], [{"image": 5}], [{"image": torch.zeros(0)}],
              [{"image": torch.zeros(3, 8, 8), "instances": {"type": "Instances"}}],
              [{"image": torch.zeros(3, 8, 8), "instances": {"type": "Boxes", "tensor": 5}}]],
    "weights": [5, {}, {"x": 5}, {"x": torch.zeros(1)}, {5: torch.zeros(1)}],
    "buffers": [5, {"x": torch.zeros(1)}, {"pixel_mean": torch.zeros(7)}],
    "normalizer": ["x"],
    "rng": [5, {}, {"cpu": torch.zeros(3)}, {"cpu": torch.zeros(3, dtype=torch.uint8)}],
    "iteration": ["x", None],
    "precision": ["nonsense", 5, "nn"],
}  # fmt: skip


@yaml_alone  # no replay of a Python config is built from files of strangers
def test_damaged_replays_are_a_sentence(make, tmp_path, capsys):
    """Never a traceback, whose exit code would say that something is not finite."""
    trainer = make()
    spoil(trainer, 0, nan_image)
    stops(trainer)
    (file,) = (tmp_path / "out" / "not_finite").glob("*.pth")
    good = torch.load(file)
    for key, values in DAMAGE.items():
        for value in [*values, KeyError]:
            content = {**good, key: value}
            if value is KeyError:
                if key == "python":  # of an earlier version
                    continue
                del content[key]
            torch.save(content, file)
            with pytest.raises(SystemExit) as stop:
                replay.main([str(file), "--device", "cpu"])
            error = capsys.readouterr().err
            assert stop.value.code == 2, (key, value)
            assert error.startswith("ghm-d2 replay: error: ") and error.count("\n") == 1
            assert len(error) < 3000 and error.strip().isprintable()


def worker(rank, folder, where):
    """One of two processes; the second meets a NaN, or another error, in iteration 1."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    register_coco_dataset(
        check_coco_dataset(parse_dataset(f"two={folder}/train.json,{folder}/images"))
    )
    pairs = tiny_pairs(
        DATASETS__TRAIN="('two',)",
        DATASETS__TEST="()",
        OUTPUT_DIR=folder / "out",
        SOLVER__MAX_ITER=3,
    )
    trainer = GHMTrainer(small_config("ghm_retinanet_R_50", *pairs))

    def change(batch):
        if rank == 1 and where == "image":
            nan_image(batch)
        if rank == 1 and where == "other":
            raise KeyError("lost")

    spoil(trainer, 2, change)
    if where == "gradient" and rank == 1:
        weight = trainer._trainer.model.module.head.bbox_pred.weight
        weight.register_hook(lambda g: g * (torch.nan if trainer.iter == 2 else 1))
    try:
        trainer.train()
    except Exception as error:
        (folder / f"{where}_{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    end_process(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the batch must lie on the CPU")
@pytest.mark.parametrize(
    "where", ["image", *(pytest.param(x, marks=pytest.mark.slow) for x in ("gradient", "other"))]
)
def test_two_processes_stop_together(tmp_path, where):
    write_coco(tmp_path)
    context = torch.multiprocessing.spawn(worker, (tmp_path, where), nprocs=2, join=False)
    for process in context.processes:
        process.join(600)
        assert process.exitcode == 0, "a process hangs or died"
    first, second = ((tmp_path / f"{where}_{rank}.txt").read_text() for rank in (0, 1))
    if where == "other":
        assert first == "UserError: process 1 has stopped: KeyError: 'lost'."
        assert second == "KeyError: 'lost'"
        return
    assert first == second and first.startswith("NotFiniteError: ")
    saved = sorted(file.name for file in (tmp_path / "out" / "not_finite").iterdir())
    assert saved[-1] == "iteration_0000002_process_1.pth"
    assert len(saved) == (1 if where == "image" else 2)


def test_sigterm_saves_no_weights_that_are_not_finite():
    checkpointer, states = Mock(), Mock()
    hook = StopOnSignal(checkpointer, states)
    hook.trainer = Mock(model=torch.nn.Linear(2, 2), iter=3, max_iter=9)
    torch.nn.init.constant_(hook.trainer.model.bias, float("nan"))
    hook._note(signal.SIGTERM, None)
    with pytest.raises(NotFiniteError, match="the first bias"):
        hook.after_step()
    assert not checkpointer.save.called
    torch.nn.init.zeros_(hook.trainer.model.bias)
    with pytest.raises(Preempted):
        hook.after_step()
    assert checkpointer.save.called
