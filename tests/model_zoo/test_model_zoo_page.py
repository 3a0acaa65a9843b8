"""What is made from the packaged index: MODEL_ZOO.md, and the wheel that carries it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from ghm_d2 import model_zoo
from ghm_d2.cli.export_zoo import main
from ghm_d2.errors import UserError
from ghm_d2.files import write_json
from ghm_d2.model_zoo.table import add_models, model_zoo_page
from ghm_d2.model_zoo.zoo import PACKAGED_INDEX, read_index
from tests.tiny import ROOT, ZOO_ENTRY

# --- MODEL_ZOO.md -------------------------------------------------------------------------------


def test_page_is_that_of_the_index():
    page = (ROOT / "MODEL_ZOO.md").read_text()
    assert page == model_zoo_page(read_index(PACKAGED_INDEX)), (
        "run ghm-d2 export-zoo --page MODEL_ZOO.md"
    )
    for ap, url in [("37.0", "a437fda3"), ("39.1", "c148ee8f"), ("40.7", "e433"), ("41.4", "dd38")]:
        (row,) = [line for line in page.splitlines() if url in line]
        assert f"| {ap} (coco_2017_val) | mmdetection |" in row
    assert page.index("Published by others") < page.index("37.0")


FIGURES = {
    "train_data": ["bccd_train"],
    "iterations": 500,
    "images_per_batch": 4,
    "seconds_per_iteration": 0.6336,
    "seconds_per_image": None,
    "memory_mib": 812,
    "box_ap": {"bccd_val": 35.77, "empty": None},
    "hardware": "1 x GPU",
    "versions": {"torch": "2.11.0"},
    "commit": "0123456789abcdef",
}


def test_row_of_a_model():
    index = {"models": [ZOO_ENTRY | FIGURES], "published": read_index(PACKAGED_INDEX)["published"]}
    page = model_zoo_page(index)
    row = "| `a/b` | 500 x 4 | 0.634 | - | 0.8 | 35.8 (bccd_val), - (empty) | 1 |"
    download = f"`a/b/1/{ZOO_ENTRY['weights']}`, `a/b/1/metrics.json` (md5 `{'0' * 32}`)"
    assert f"{row} {download} | bccd_train | 1 x GPU | 2.11.0 | 01234567 |" in page
    assert 'model_zoo.get("a/b.yaml", trained=True)' in page


def test_nothing_is_listed_that_nobody_can_have():
    """Without weights to fetch, the page says how they are made."""
    assert read_index(PACKAGED_INDEX)["models"] == []
    page = (ROOT / "MODEL_ZOO.md").read_text()
    assert "No weights are published" in page and "ghm-d2 export-zoo --run output" in page


def test_models_of_another_index():
    index = {"models": [ZOO_ENTRY]}
    assert add_models(index, [ZOO_ENTRY, ZOO_ENTRY | {"id": 2}]) == 1
    assert [entry["id"] for entry in index["models"]] == [1, 2]
    with pytest.raises(UserError, match="the index has another model a/b/1"):
        add_models(index, [ZOO_ENTRY | {"md5": "1" * 32}])


def test_command_takes_over_a_zoo(tmp_path, monkeypatch, capsys):
    """The whole way from a folder of exports to the page; run on a copy."""
    packaged, page = tmp_path / "index.json", tmp_path / "MODEL_ZOO.md"
    shutil.copy(PACKAGED_INDEX, packaged)
    (tmp_path / "zoo").mkdir()
    write_json(tmp_path / "zoo" / "index.json", {"models": [ZOO_ENTRY | FIGURES]})
    monkeypatch.setattr("ghm_d2.model_zoo.zoo.PACKAGED_INDEX", packaged)
    for added in (1, 0):
        main(["--page", str(page), "--zoo", str(tmp_path / "zoo")])
        said = capsys.readouterr().out
        before = len(read_index(PACKAGED_INDEX)["models"])
        assert f"{before + 1} models of our own, {added} of them new" in said
    assert "| `a/b` | 500 x 4 |" in page.read_text()
    assert read_index(packaged)["published"] == read_index(PACKAGED_INDEX)["published"]
    with pytest.raises(SystemExit) as stop:
        main(["--page", str(page), "--zoo", str(tmp_path / "gone")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("ghm-d2 export-zoo: error: ")
    assert "gone/index.json cannot be read" in error


# --- packaging ----------------------------------------------------------------------------------


def test_losses_need_no_zoo():
    code = "import sys, ghm_d2.losses; print('detectron2' in sys.modules)"
    assert run_python(code, PYTHONPATH=str(ROOT)) == "False\n"


def run_python(code, folder=ROOT, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "GHM_D2_ZOO"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


# A config by its name from anywhere, and what the installed program says to a missing image.
COMMANDS = """
import importlib.metadata, sys
from ghm_d2.ablation import TABLES, load_grid
assert [load_grid(file) for file in TABLES.values()]  # their config files are found
from ghm_d2.engine.setup import locate_config_file
print(locate_config_file("configs/ghm_faster_rcnn_R_50.yaml"))
sys.stderr = sys.stdout
(program,) = importlib.metadata.distribution("ghm_d2").entry_points
words = ["--config-file", "ghm_retinanet_R_50.yaml", "--input", "gone.png", "--output", "out"]
for command in ("predict", "train"):
    sys.argv = [program.name, command, *words]
    try:
        program.load()()
    except SystemExit as stop:
        print(stop.code)
"""


def test_installed_wheel_works_on_its_own(tmp_path):
    """Built from a copy, because a build writes into the checkout."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("configs", "ghm_d2"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    run_python("from setuptools.build_meta import build_wheel; build_wheel('.')", source)
    (wheel,) = source.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    shutil.rmtree(source)
    name = "quickstart/ghm_retinanet_quickstart.yaml"
    code = "import ghm_d2; print(ghm_d2.__file__); "
    code += f"print(ghm_d2.model_zoo.get_config('{name}').dump())"
    out = run_python(code, tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    file, _, dumped = out.partition("\n")
    assert Path(file).is_relative_to(tmp_path / "installed")
    cfg = model_zoo.get_config(name)
    assert yaml.safe_load(dumped) == yaml.safe_load(cfg.dump())
    root = tmp_path / "installed" / "ghm_d2"
    there = {p.relative_to(root / "configs") for p in (root / "configs").rglob("*.yaml")}
    assert there == {p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml")}
    assert (root / "model_zoo" / "index.json").read_bytes() == PACKAGED_INDEX.read_bytes()
    assert (tmp_path / "installed" / "ghm_d2" / "py.typed").is_file()
    said = run_python(COMMANDS, tmp_path, PYTHONPATH=str(tmp_path / "installed")).splitlines()
    assert said == [
        str(root / "configs" / "ghm_faster_rcnn_R_50.yaml"),
        "ghm-d2 predict: error: the input gone.png does not exist.",
        "2",
        "ghm-d2 train: error: unrecognized arguments: --input gone.png --output out "
        "(--help lists the options).",
        "2",
    ]
