"""What made a result: commit, machine and versions."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ghm_d2 import provenance

GIT = ("git", "-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")


def asked(package: Path) -> str:
    """The commit that a copy of the module at `package` says, asked in a process of its own."""
    code = "import provenance; print(provenance.commit())"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=package, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def git(folder: Path, *words: str) -> str:
    done = subprocess.run([*GIT, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder `ghm_d2` with the module, in no checkout."""
    folder = tmp_path / "ghm_d2"
    folder.mkdir()
    shutil.copy(provenance.__file__, folder)
    return folder


def test_commit_of_a_checkout_with_its_mark(package: Path) -> None:
    root = package.parent
    git(root, "init", "-q")
    (root / ".gitignore").write_text("__pycache__\n")
    git(root, "add", ".")
    git(root, "commit", "-qm", "a")
    git(root, "tag", "v1")  # the digits are asked for, not the name
    head = git(root, "rev-parse", "HEAD")
    assert asked(package) == head
    (root / ".gitignore").write_text("__pycache__\nx\n")
    assert asked(package) == head + "-dirty"


def test_no_commit_outside_a_checkout_nor_of_another_one(package: Path) -> None:
    assert asked(package) == "None"
    above = package.parent.parent
    git(above, "init", "-q")
    git(above, "commit", "-q", "--allow-empty", "-m", "another project")
    try:
        assert asked(package) == "None"
    finally:
        shutil.rmtree(above / ".git")


def test_no_commit_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() is None
    assert provenance.describe()["dirty"] is None


def test_description_is_json_and_complete() -> None:
    found = json.loads(json.dumps(provenance.describe()))
    assert list(found) == ["date", "commit", "dirty", "machine", "versions"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
    keys = {"device", "cpu", "cores", "threads", "memory_gib", "load_average_at_start"}
    assert found["machine"].keys() == keys
    import torch

    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] and "cuda" in found["versions"]


def test_hardware_in_words() -> None:
    import torch

    threads = torch.get_num_threads()
    word = "thread" if threads == 1 else "threads"
    assert provenance.hardware() == f"{provenance.processor_name()}, {threads} {word}"
    assert ", 4 processes with " in provenance.hardware("cpu", 4)
