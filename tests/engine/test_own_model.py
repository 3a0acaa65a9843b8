"""The model of a training stays the user's: copied, pickled and called at any moment."""

import copy
import io
import pickle

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from ghm_d2.data import check_coco_dataset, parse_dataset, register_coco_dataset
from ghm_d2.engine import GHMTrainer
from ghm_d2.engine.process_end import end_process
from tests.detectors import small_config
from tests.tiny import tiny_pairs, unregister_all, write_coco


def save_and_load(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def averaged(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    return average.module


def mean_teacher(model):
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    for mine, theirs in zip(teacher.parameters(), model.parameters(), strict=True):
        mine.lerp_(theirs, 0.5)
    teacher.load_state_dict(model.state_dict(), strict=True)
    return teacher


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": save_and_load,
    "average": averaged,
    "teacher": mean_teacher,
}


class Copying(HookBase):
    """Copies the model at every moment of the second iteration, and calls each copy."""

    def __init__(self, model, copied):
        self.model, self.copied, self.moments = model, copied, []

    def note(self, moment):
        twin = self.copied(self.model)
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in twin.modules()
        )
        assert all(
            torch.equal(x, y)
            for x, y in zip(
                twin.state_dict().values(), self.model.state_dict().values(), strict=True
            )
        )
        with torch.no_grad():
            twin.eval()([{"image": torch.zeros(3, 64, 64)}])
        self.moments.append(moment)

    def before_step(self):
        if self.trainer.iter == 1:
            self.note("before_step")

    def after_backward(self):
        if self.trainer.iter == 1:
            self.note("after_backward")

    def after_step(self):
        if self.trainer.iter == 1:
            self.note("after_step")

    def after_train(self):
        self.note("after_train")


@pytest.fixture
def data(tmp_path):
    yield f"own={write_coco(tmp_path)}"
    unregister_all()


def make_trainer(spec, output, iterations=2):
    register_coco_dataset(check_coco_dataset(parse_dataset(spec)))
    pairs = tiny_pairs(
        DATASETS__TRAIN="('own',)",
        DATASETS__TEST="()",
        OUTPUT_DIR=output,
        SOLVER__MAX_ITER=iterations,
    )
    return GHMTrainer(small_config("ghm_retinanet_R_50", *pairs))


@pytest.mark.parametrize("name", COPIES)
def test_the_model_can_be_copied_at_any_moment(data, tmp_path, name):
    trainer = make_trainer(data, tmp_path / "out")
    hook, inner = Copying(trainer.model, COPIES[name]), Copying(trainer.model, COPIES[name])
    hook.note("built")
    trainer.register_hooks([hook])
    trainer._trainer.register_hooks([inner])  # Detectron2 offers after_backward there alone
    trainer.train()
    hook.note("done")
    assert hook.moments == ["built", "before_step", "after_step", "after_train", "done"]
    assert inner.moments == ["after_backward"]


class ValidationLoss(HookBase):
    """The usual hook: losses in training mode, in the main process alone."""

    def __init__(self, model, batch):
        self.model, self.batch = model, batch

    def after_step(self):
        if comm.is_main_process():
            module = self.model.module
            copy.deepcopy(module)
            with torch.no_grad():
                self.model(self.batch)
                module(self.batch)
            sum(module(self.batch).values()).backward()


def worker(rank, folder, spec):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    trainer = make_trainer(spec, folder / "out", iterations=3)
    batch = next(iter(trainer.data_loader))
    trainer.register_hooks([ValidationLoss(trainer.model, batch)])
    steps = []
    any_of_all = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *a, **k: (steps.append(1), any_of_all(*a, **k))[1]
    trainer.train()
    weights = [p.detach() for p in trainer.model.parameters()]
    torch.save((weights, len(steps)), folder / f"{rank}.pt")
    end_process(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the batch must lie on the CPU")
def test_a_forward_pass_of_one_process_meets_no_other(data, tmp_path):
    context = torch.multiprocessing.spawn(worker, (tmp_path, data), nprocs=2, join=False)
    for process in context.processes:
        process.join(600)
    codes = [process.exitcode for process in context.processes]
    for process in context.processes:
        process.kill()
    assert codes == [0, 0], "a process hangs or died"
    (first, calls), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert calls == others > 0
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
