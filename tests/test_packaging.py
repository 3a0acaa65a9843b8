"""Set-up: metadata against constraints.txt, the bootstrap's decisions, the Makefile's targets."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ghm_d2 import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def load_bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "tools" / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bootstrap = load_bootstrap()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def required() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for group in [PROJECT["dependencies"], *extras] for text in group]


def pins(python: str) -> dict[str, str]:
    """The constraints that hold on this Python on Linux: canonical name -> version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(x) for x in lines if x.strip() and not x.startswith("#")]
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    held = [r for r in requirements if not r.marker or r.marker.evaluate(environment)]
    names = [canonicalize_name(r.name) for r in held]
    assert len(names) == len(set(names)), "a package is pinned twice for one Python"
    versions = [re.fullmatch(r"==([^*,]+)", str(r.specifier)) for r in held]
    assert all(versions), "constraints.txt holds something that is not name==version"
    return dict(zip(names, (v.group(1) for v in versions), strict=True))


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_each_requirement_within_its_bounds(python):
    pinned = pins(python)
    for requirement in required():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} has no line in constraints.txt on Python {python}"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} but {pinned[name]}"


def test_each_requirement_has_a_lower_bound():
    for requirement in required():
        assert any(s.operator == ">=" for s in requirement.specifier), str(requirement)


def test_python_minimum_is_the_same_everywhere():
    minimum = "{}.{}".format(*bootstrap.MINIMUM_PYTHON)
    assert PROJECT["requires-python"] == f">={minimum}"
    assert PYTHONS[0] == minimum


def test_detectron2_is_no_requirement_of_the_metadata():
    assert "detectron2" not in [canonicalize_name(r.name) for r in required()]


@pytest.mark.parametrize(
    ("version", "fine"),
    [((3, 9, 18), False), ((2, 7, 18), False), ((3, 10, 0), True), ((3, 13, 0), True)],
)
def test_python_version_check(version, fine):
    problem = bootstrap.python_problem(version)
    assert (problem == "") == fine
    if not fine:
        assert f"Python {version[0]}.{version[1]} is too old" in problem and "3.10" in problem


def test_hash_check_refuses_another_file(tmp_path):
    wheel = tmp_path / "detectron2.whl"
    wheel.write_bytes(b"the right bytes")
    right = hashlib.sha256(b"the right bytes").hexdigest()
    bootstrap.check_sha256(wheel, right)
    wheel.write_bytes(b"the wrong bytes")
    with pytest.raises(bootstrap.SetupError, match="was not installed.*not " + right):
        bootstrap.check_sha256(wheel, right)


def test_stamp_key_follows_each_file_and_the_folder(tmp_path):
    def checkout(name: str) -> Path:
        for file in bootstrap.KEY_FILES:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file)
        return tmp_path / name

    one = checkout("one")
    keys = [bootstrap.stamp_key(one), bootstrap.stamp_key(checkout("two"))]
    for file in bootstrap.KEY_FILES:
        (one / file).write_text("changed")
        keys.append(bootstrap.stamp_key(one))
    assert len(set(keys)) == len(keys)
    assert keys[-1] == bootstrap.stamp_key(one)


OURS = {"created_here": True, "complete": True, "requested": "", "key": "k"}
BY_HAND = {"complete": True, "requested": "", "key": "k"}


@pytest.mark.parametrize(
    ("record", "requested", "whole", "expected"),
    [
        (OURS, "", True, "nothing"),
        (OURS, "", False, "rebuild"),
        ({**OURS, "key": "old"}, "", True, "packages"),
        ({**OURS, "complete": False}, "", True, "rebuild"),
        (OURS, "git+file:///d2", True, "rebuild"),
        ({**OURS, "requested": "git+file:///d2"}, "git+file:///d2", True, "nothing"),
        ({}, "", True, "packages"),
        ({}, "", False, "packages"),
        (BY_HAND, "", True, "nothing"),
        (BY_HAND, "", False, "packages"),
        ({**BY_HAND, "complete": False}, "", True, "packages"),
        (BY_HAND, "git+file:///d2", True, "packages"),
    ],
)
def test_what_an_existing_environment_needs(record, requested, whole, expected):
    assert bootstrap.needs(record, "k", requested, whole) == expected


def test_record_survives_a_damaged_file(tmp_path):
    environment = bootstrap.Environment(tmp_path)
    assert environment.record() == {}
    environment.write(OURS)
    assert environment.record() == OURS
    environment.record_file.write_text(json.dumps(OURS)[:10])
    assert environment.record() == {}


def test_failed_step_is_one_sentence_below_the_reason(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    code = "import sys; print('the reason'); sys.exit(3)"
    with pytest.raises(bootstrap.SetupError, match="while building it.*setup.log"):
        bootstrap.run("building it", [sys.executable, "-c", code], tmp_path / "setup.log")
    assert "the reason" in capfd.readouterr().out
    bootstrap.run("saying it", [sys.executable, "-c", "print('quiet')"], tmp_path / "setup.log")
    assert "quiet" not in capfd.readouterr().out


def test_the_source_distribution_holds_the_checkout(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("this is no checkout")
    files = [file for file in listed.stdout.splitlines() if (ROOT / file).exists()]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    code = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    assert archive.name == f"ghm_d2-{__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    assert not set(files) - held


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert citation["version"] == __version__ == newest.group(1)
    assert citation["date-released"] == newest.group(2)


def make(*arguments: str) -> str:
    # Without what an outer `make test ARGS=...` hands down.
    drop = {"MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "ARGS", "PYTHON", "CONFIG"}
    environment = {k: v for k, v in os.environ.items() if k not in drop}
    command = ["make", "--no-print-directory", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_makefile_targets():
    listed = make()
    for target in ("setup", "quickstart", "test", "test-slow", "lint", "bench", "docs", "dist"):
        assert f"make {target} " in listed
        assert "tools/bootstrap.py" in make("--dry-run", target)
    assert "configs/quickstart/ghm_retinanet_quickstart.yaml" in make("--dry-run", "quickstart")
    assert "-m slow" in make("--dry-run", "test-slow")
    assert "slow" not in make("--dry-run", "test")


def test_makefile_takes_a_chosen_python_as_such():
    assert "--python-was-chosen" in make("--dry-run", "setup", "PYTHON=python3")
    assert "--python-was-chosen" not in make("--dry-run", "setup")


def test_make_clean_keeps_data_and_models():
    deleting = [x for x in make("--dry-run", "clean").splitlines() if x.startswith("rm")]
    assert deleting and ".venv" in deleting[0]
    assert not {"output", "datasets", "weights", "shared"} & set(" ".join(deleting).split())
