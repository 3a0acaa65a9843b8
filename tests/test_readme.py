"""The README's commands run as they stand, but for fewer and smaller steps."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from detectron2.data.datasets import builtin_meta

from ghm_d2 import cli
from ghm_d2.engine import main as train
from tests.tiny import ROOT, coco_content, forget_program, tiny_pairs, write_coco

TEXT = (ROOT / "README.md").read_text()
SHELL = [block.strip() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)]
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)
MAKE = [c for c in SHELL if c.startswith("make ")]
TRAIN = [c for c in SHELL if c.startswith("python train_net.py ")]
TOOLS = [c for c in SHELL if c.startswith("ghm-d2 ")]
COCO_THINGS = [
    {"id": c["id"], "name": c["name"]} for c in builtin_meta.COCO_CATEGORIES if c["isthing"]
]


def run(words, folder):
    """Runs a command in ``folder``; returns its output, or fails with it."""
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that looks like the checkout, beside COCO-format data as the README names it."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    for name in ("train", "val"):
        write_coco(folder / "data", name)
    coco = folder / "datasets" / "coco"
    for name in ("train2017", "val2017"):
        write_coco(coco, f"instances_{name}", coco_content() | {"categories": COCO_THINGS})
        shutil.copytree(coco / "images", coco / name)
        (coco / "annotations").mkdir(exist_ok=True)
        (coco / f"instances_{name}.json").rename(coco / "annotations" / f"instances_{name}.json")
    return folder


def test_every_shell_command_is_tested():
    assert TRAIN and MAKE and TOOLS and set(SHELL) == {*TRAIN, *MAKE, *TOOLS}


@pytest.mark.parametrize("command", TOOLS, ids=lambda c: c.split()[1])
def test_commands_know_their_options(command, capsys):
    """The commands run in tests of their own; here the README must not name an unknown option."""
    words = shlex.split(command)
    with pytest.raises(SystemExit) as stop:
        cli.main([words[1], "--help"])
    text = capsys.readouterr().out
    options = [word for word in words if word.startswith("--")]
    assert stop.value.code == 0 and [option for option in options if option not in text] == []


def test_train_net_commands_run(checkout, monkeypatch, capsys):
    """In the README's order: the evaluation needs what the training before it wrote."""
    monkeypatch.chdir(checkout)
    pairs = {key: value for key, value in zip(*[iter(tiny_pairs())] * 2, strict=True)}
    for command in TRAIN:
        words = shlex.split(command.replace("--num-gpus 8", "--num-gpus 1"))
        kept = {k: v for k, v in pairs.items() if not (k == "MODEL.WEIGHTS" and k in words)}
        train([*words[2:], *(word for pair in kept.items() for word in pair)])
        forget_program()
        output = capsys.readouterr().out
        # Two steps on noise find nothing, which Detectron2 reports in a sentence of its own.
        assert "Evaluation results for bbox" in output or "No predictions" in output, output[-2000:]
    assert (checkout / "output" / "model_final.pth").exists()


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_examples_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(block, {"__name__": "__main__"})


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_exist(command):
    assert shutil.which("make")
    run([*shlex.split(command), "--dry-run"], ROOT)


def test_links_lead_somewhere():
    anchors = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).strip().replace(" ", "-")
        for line in TEXT.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("path", re.findall(r"`(configs/[\w/.]+\.yaml)`", TEXT))
def test_named_configs_exist(path):
    assert (ROOT / path).is_file()


def cells_by_row(lines):
    """First cell of a Markdown table's row to the others; rows of one name are joined."""
    rows = {}
    for line in lines:
        name, *cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        rows.setdefault(name, []).extend(cells)
    return rows


REPORTED = re.split(r"\]\((benchmarks/results/small_data[\w/]*\.md)\)", TEXT)


@pytest.mark.parametrize(
    ("report", "after"),
    [pytest.param(r, text, id=r) for r, text in zip(REPORTED[1::2], REPORTED[2::2], strict=True)],
)
def test_figures_are_those_of_the_report(report, after):
    """The table behind a link to a report has rows of that report, cell by cell."""
    table = re.search(r"(?:^\|.*\n)+", after, re.M).group().splitlines()
    written = cells_by_row(table[2:])
    reported = cells_by_row(
        line for line in (ROOT / report).read_text().splitlines() if "|" in line
    )
    assert len(written) >= 3
    for name, cells in written.items():
        rest = iter(reported[name])  # the same figures in the same order
        assert all(cell in rest for cell in cells if cell), name


@pytest.mark.slow
def test_quick_start_whole(tmp_path):
    """The command of the quick start, from a fresh clone to its summary, with the promised AP."""
    run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], tmp_path)
    output = run(["make", "quickstart"], tmp_path / "clone")
    ap50 = float(re.findall(r"AP50[^\d]*([\d.]+)", output)[-1])
    assert ap50 >= 50
    assert Path(tmp_path / "clone" / "output").is_dir()
