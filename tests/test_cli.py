"""The program: every command is there, says what it does, and answers a mistake in one sentence."""

import runpy
import subprocess
import sys
from importlib import import_module

import pytest

from ghm_d2 import __version__, cli
from tests.tiny import ROOT


def fails(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_list_names_every_command(words, capsys):
    cli.main(words)
    text = capsys.readouterr().out
    files = {p.stem.replace("_", "-") for p in (ROOT / "ghm_d2" / "cli").glob("[a-z]*.py")}
    assert files == set(cli.COMMANDS)
    assert all(f"  {name} " in text and about in text for name, about in cli.COMMANDS.items())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_has_a_help_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("usage: ")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_answers_an_unknown_option_in_one_sentence(name, capsys):
    error = fails(capsys, name, "--nonsense")
    assert ": error: " in error and error.endswith(".\n")


def test_an_unknown_command_names_similar_ones(capsys):
    assert "no command 'exprot' (similar: export" in fails(capsys, "exprot")
    assert "no command '--dataset'" in fails(capsys, "--dataset")


def test_the_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"ghm_d2 {__version__}\n"


def test_python_m_is_the_same_program(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ghm_d2", "--version"])
    runpy.run_module("ghm_d2", run_name="__main__")
    assert capsys.readouterr().out == f"ghm_d2 {__version__}\n"


def test_the_list_needs_neither_torch_nor_detectron2():
    code = "import sys; from ghm_d2.cli import main; main([]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "detectron2"} & set(done.stdout.split())


def test_without_detectron2_the_losses_work_and_the_rest_says_how_to_get_it():
    code = """
import sys, torch
class Hidden:
    def find_spec(name, path=None, target=None):
        if name == "detectron2":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden)
from ghm_d2.losses import GHMCLoss
assert GHMCLoss()(torch.zeros(2, 3), torch.tensor([0, 3])) > 0
try:
    from ghm_d2 import add_ghm_config
except ImportError as error:
    print(error)
from ghm_d2.cli import main
main(["train", "--config-file", "any.yaml"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stdout.startswith("Detectron2 is not installed: ") and "pip install" in done.stdout
    assert done.stderr == f"ghm-d2 train: error: {done.stdout}"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_nothing_imports_a_command(name):
    module = import_module(f"ghm_d2.cli.{name.replace('-', '_')}").__name__
    rooms = [p for p in (ROOT / "ghm_d2").rglob("*.py") if p.parent.name != "cli"]
    assert not [p for p in rooms if module in p.read_text()]
