"""The command line: where options and KEY VALUE pairs may stand, and which values survive."""

import sys

import pytest

from ghm_d2.engine import main, summary
from ghm_d2.engine.arguments import Parser, parse_arguments
from ghm_d2.engine.setup import locate_config_file
from ghm_d2.errors import UserError
from ghm_d2.model_zoo import get_config_file

CONFIG = ["--config-file", "f.yaml"]
PAIRS = ["SOLVER.MAX_ITER", "2", "DATASETS.TRAIN", "('a',)"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--config-file", "f.yaml", "--num-gpus", "2", "--eval-only", *PAIRS],
        [*PAIRS, "--eval-only", "--config-file", "f.yaml", "--num-gpus=2"],
        ["--eval-only", *PAIRS[:2], "--num-gpus", "2", *PAIRS[2:], "--config-file=f.yaml"],
    ],
    ids=["before", "after", "between"],
)
def test_options_may_stand_anywhere(argv):
    args = parse_arguments(argv)
    assert (args.config_file, args.num_gpus, args.eval_only) == ("f.yaml", 2, True)
    assert args.opts == PAIRS
    assert (args.resume, args.num_machines, args.machine_rank) == (False, 1, 0)


@pytest.mark.parametrize("value", ["-1", "-1e-3", "1e-3", "('a',)", "[1,2]", "", "a=b,c", "-"])
@pytest.mark.parametrize("last", [True, False])
def test_values_survive(value, last):
    config = ["--config-file", "f.yaml"]
    argv = [*config, "KEY", value] if last else ["KEY", value, *config]
    assert parse_arguments(argv).opts == ["KEY", value]


@pytest.mark.parametrize(
    ("file", "words"), [("f.yaml", ["SEED", "1"]), ("f.py", ["train.seed=1"])], ids=["yaml", "py"]
)
def test_a_list_ends_at_a_key_of_the_config(file, words):
    parser = Parser()
    parser.add_argument("--config-file")
    parser.add_argument("--input", nargs="+")
    argv = ["--config-file", file, "--input", "t=1.png", "b.png", *words]
    args = parse_arguments(argv, parser, lists=("--input",))
    assert args.input == ["t=1.png", "b.png"] and args.opts == words


@pytest.mark.parametrize(
    "words",
    [
        ["--dataset", "a=1.json,x", "--dataset", "b=2.json,x"],
        ["--dataset", "a=1.json,x", "b=2.json,x"],
        ["--dataset=a=1.json,x", "--dataset=b=2.json,x"],
    ],
)
def test_dataset_repeats_and_leaves_the_pairs(words):
    args = parse_arguments(["--config-file", "f.yaml", *words, *PAIRS])
    assert args.dataset == ["a=1.json,x", "b=2.json,x"]
    assert args.opts == PAIRS


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--config-file", "f", "--nun-gpus", "2"], "--nun-gpus"),
        (["--config-file", "f", "KEY", "1", "--evil-only"], "--evil-only"),
        (["--config-file", "f", "--eval"], "--eval"),  # no abbreviations
        (["--config-file", "f", "--num-gpus", "two"], "--num-gpus"),
        (["--config-file", "f", "KEY", "1", "OTHER"], r"odd number of words \(3\)"),
        (["KEY", "1"], "--config-file"),
        (["--config-file"], "--config-file"),
        (["--config-file", "f", "--dataset"], "--dataset"),
    ],
)
def test_mistakes_are_named(argv, words):
    with pytest.raises(UserError, match=words):
        parse_arguments(argv)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--config-file", "--eval-only", "--resume", "--dataset", "--num-gpus", "KEY"):
        assert option in text


@pytest.mark.parametrize(
    ("started", "name"),
    [("bin/ghm-d2", "ghm-d2 train"), ("train_net.py", "train_net.py"), ("", "train_net.py")],
)
def test_messages_name_what_was_run(started, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [started])
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err.startswith(f"{name}: error: ")
    monkeypatch.setattr(sys, "argv", [started])
    assert summary._line("train", "--resume").endswith(f"{name} --resume")


def test_config_files_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "ghm_retinanet_R_50.yaml"
    packaged = get_config_file(name)
    assert locate_config_file(name) == locate_config_file(f"configs/{name}") == packaged
    (tmp_path / name).write_text("")
    assert locate_config_file(name) == name  # a file of the user's comes first
    with pytest.raises(UserError, match=r"ghm_retinanet_R_5\.yaml does not exist \(similar: ghm_r"):
        locate_config_file("ghm_retinanet_R_5.yaml")
