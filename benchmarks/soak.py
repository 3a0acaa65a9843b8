"""Kill trainings at random moments, resume them, and compare each with the undisturbed one.

Every trial is a short training of a tiny detector on the CPU, disturbed once in one of four ways
and resumed to its end. Its final checkpoint must be equal, bit for bit, to that of an undisturbed
training. The results go to OUTPUT/soak.json and OUTPUT/soak.md after each trial; started again with
the same options, the campaign continues where it stopped.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ghm_d2.files import write_json, write_text
from ghm_d2.markdown import markdown_table
from ghm_d2.provenance import commit, processor_name

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from tiny import RETINANET, TINY, write_coco  # noqa: E402

SCRIPT = str(ROOT / "train_net.py")
STEPS, PERIOD = 24, 4
SETTINGS = TINY | {
    "INPUT.MIN_SIZE_TRAIN": (48, 64),
    "SOLVER.MAX_ITER": STEPS,
    "SOLVER.CHECKPOINT_PERIOD": PERIOD,
}
TRAINER = [sys.executable, SCRIPT]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TORCHRUN += ["--max-restarts", "1", SCRIPT]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


class Job:
    """A training in a process group of its own, its output in a file."""

    def __init__(self, command: list[str], data: str, output: Path, *words: Any) -> None:
        pairs = [str(word) for pair in SETTINGS.items() for word in pair]
        self.log = output.with_suffix(".log")
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [*command, "--config-file", RETINANET, *pairs, "OUTPUT_DIR", str(output)]
                + ["--dataset", data, *map(str, words)],
                stdout=log,
                stderr=log,
                env=ENVIRONMENT,
                start_new_session=True,
            )

    def wait(self, seconds: float = 300) -> int | None:
        """The exit code; None where it had to be killed because it hung."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def kill(self) -> None:
        """Ends every process of the job."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def children(pid: int) -> list[int]:
    """The living child processes of a process."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as stream:
        return [int(word) for word in stream.read().split()]
    return []


class Campaign:
    """The trials, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rng = folder, random.Random()
        self.hit = False  # whether the last trial disturbed a running training
        self.data = f"soak={write_coco(folder, 'soak')}"
        self.whole: dict[str, tuple[Path, float]] = {}

    def undisturbed(self, kind: str, command: list[str]) -> tuple[Path, float]:
        """The folder of an undisturbed training, and how many seconds it took."""
        if kind not in self.whole:
            output = self.folder / f"whole_{kind}"
            start = time.perf_counter()
            if Job(command, self.data, output).wait() != 0:
                raise SystemExit(f"the undisturbed training failed: see {output}.log")
            self.whole[kind] = output, time.perf_counter() - start
        return self.whole[kind]

    def trainer(self, output: Path) -> str:
        """SIGKILL to a training of one process."""
        whole, seconds = self.undisturbed("one", TRAINER)
        job = Job(TRAINER, self.data, output)
        time.sleep(self.rng.uniform(0.05, 1) * seconds)
        self.hit = job.process.poll() is None
        job.kill()
        return self.finish(output, whole)

    def torchrun(self, output: Path) -> str:
        """SIGKILL to one of two processes; torchrun itself starts them again."""
        whole, seconds = self.undisturbed("two", TORCHRUN)
        job = Job(TORCHRUN, self.data, output)
        time.sleep(self.rng.uniform(0.3, 1) * seconds)
        workers = children(job.process.pid)
        self.hit = bool(workers)
        if workers:
            os.kill(self.rng.choice(workers), signal.SIGKILL)
        code = job.wait()
        return compare(output, whole) if code == 0 else f"torchrun ended with {code}"

    def loader(self, output: Path) -> str:
        """SIGKILL to the process that loads images; the training must end by itself."""
        whole, seconds = self.undisturbed("one", TRAINER)
        job = Job(TRAINER, self.data, output, "DATALOADER.NUM_WORKERS", 1)
        while job.process.poll() is None and not (output / "metrics.json").exists():
            time.sleep(0.02)
        time.sleep(self.rng.uniform(0, 0.3) * seconds)
        workers = children(job.process.pid)
        self.hit = bool(workers)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        if job.wait() is None:
            return "the training hung"
        return self.finish(output, whole, "DATALOADER.NUM_WORKERS", 1)

    def disk(self, output: Path) -> str:
        """A disk that is full while a checkpoint is written, and has space again afterwards."""
        whole, _ = self.undisturbed("one", TRAINER)
        room = self.rng.uniform(0.2, 4.0) * (whole / "model_final.pth").stat().st_size
        output.mkdir()
        mount("-t", "tmpfs", "-o", f"size={int(room) + 200_000}", "tmpfs", str(output))
        try:
            code = Job(TRAINER, self.data, output).wait()
            if code is None:
                return "the training hung"
            self.hit = code != 0
            mount("-o", "remount,size=64m", str(output))
            return self.finish(output, whole)
        finally:
            subprocess.run(["umount", "-l", str(output)], check=True)

    def finish(self, output: Path, whole: Path, *words: Any) -> str:
        """Resume a training and compare it; returns what went wrong, or ""."""
        pointer = output / "last_checkpoint"
        if not (pointer.exists() and pointer.read_text() == "model_final.pth"):
            code = Job(TRAINER, self.data, output, "--resume", *words).wait()
            if code != 0:
                return f"the resumed training ended with {code}"
        return compare(output, whole)


def mount(*words: str) -> None:
    """Runs mount, which needs root."""
    subprocess.run(["mount", *words], check=True)


def compare(output: Path, whole: Path) -> str:
    """What differs between the final checkpoints of two trainings, or ""."""
    a, b = (torch.load(x / "model_final.pth", weights_only=True) for x in (output, whole))
    return difference(a, b, "")


def difference(a: Any, b: Any, path: str) -> str:
    """The place of the first difference of two checkpoints."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        found = (difference(a[key], b[key], f"{path}/{key}") for key in a)
        return next((text for text in found if text), "")
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        found = (difference(x, y, f"{path}/{i}") for i, (x, y) in enumerate(zip(a, b, strict=True)))
        return next((text for text in found if text), "")
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return "" if equal else f"{path} differs"


def plan(kills: int, seed: int) -> list[str]:
    """The scenario of each trial; half of them are kills of a single trainer."""
    kinds = ["trainer", "torchrun", "trainer", "loader", "trainer", "disk"]
    order = [kinds[i % len(kinds)] for i in range(kills)]
    random.Random(seed).shuffle(order)
    return order


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    header = ["disturbed by", "trials", "disturbed at work", "of these bit-equal after the resume"]
    rows = []
    for kind in ("trainer", "torchrun", "loader", "disk"):
        trials = [t for t in results["trials"] if t["kind"] == kind]
        if not trials:
            continue
        skipped = sum(t["result"].startswith("left out") for t in trials)
        failed = sum(t["result"] != "" for t in trials) - skipped
        hit = [t for t in trials if t["disturbed"]]
        fine = sum(t["result"] == "" for t in hit)
        what = " ".join(getattr(Campaign, kind).__doc__.split()).rstrip(".")
        rows.append([what, *map(str, (len(trials), len(hit), fine, failed, skipped))])
    about = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    table = markdown_table([*header, "failed", "left out"], rows)
    told = f"`{results['command']}`: {about}; commit {results['commit']}."
    return f"# Kills survived\n\n{table}\n\n{told}\n"


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="number of trials (50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments and order (0)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    order = plan(args.kills, args.seed)
    file = args.output / "soak.json"
    results = {
        "command": f"python benchmarks/soak.py --kills {args.kills} --seed {args.seed}",
        "commit": commit(),
        "machine": {
            "processor": processor_name(),
            "Python": platform.python_version(),
            "PyTorch": torch.__version__,
        },
        "steps": STEPS,
        "trials": [],
    }
    if file.exists():
        before = json.loads(file.read_text())
        if all(before[key] == results[key] for key in ("command", "commit", "machine", "steps")):
            results = before
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    campaign = Campaign(folder)
    bar = tqdm(order, unit="kill", desc="soak")
    for number, kind in enumerate(bar):
        if number < len(results["trials"]):
            continue
        campaign.rng = random.Random(f"{args.seed}/{number}")  # the same in a resumed campaign
        output = folder / f"{number}_{kind}"
        can = kind != "disk" or os.geteuid() == 0
        result = getattr(campaign, kind)(output) if can else "left out: not root"
        hit = can and campaign.hit
        results["trials"].append({"kind": kind, "disturbed": hit, "result": result})
        write_json(file, results)
        write_text(args.output / "soak.md", report(results))
        if result and can:
            tqdm.write(f"trial {number} ({kind}): {result}; see {output}.log")
        else:
            shutil.rmtree(output, ignore_errors=True)
    failed = [t for t in results["trials"] if t["result"] not in ("", "left out: not root")]
    print(report(results))
    if failed:
        sys.exit(f"{len(failed)} trials failed: see {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
