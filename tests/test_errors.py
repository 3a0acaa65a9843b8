"""How a user's mistake is told: what a file may hold reaches the terminal escaped."""

from pathlib import Path

import pytest

from ghm_d2.errors import (
    UserError,
    building,
    cannot,
    exits_with_one_sentence,
    reason,
    shown,
    similar_names,
)
from ghm_d2.losses import GHMCLoss


def test_shown_text_is_printable_and_short():
    assert shown("Größe 中 \u00e9") == "Größe 中 \u00e9"
    assert shown("a\x1b[31m\nb\u202ec\ud800") == "a\\x1b[31m\\nb\\u202ec\\ud800"
    assert shown("abcdefghijklmnop", 10) == "abcd...nop" and len(shown("x" * 400)) == 300
    assert shown(None) == "None"


def test_reasons_are_one_line():
    assert reason(FileNotFoundError(2, "No such file", "/a")) == "No such file"
    assert reason(OSError("only text")) == "only text"
    assert reason(UnicodeDecodeError("utf-8", b"", 0, 1, "x")) == "it is not text in UTF-8"
    assert reason(ValueError("two\n lines.")) == "two lines" and reason(KeyError("k")) == "k"
    assert reason(ValueError()) == "ValueError"
    text = str(cannot("read", "the file x", OSError(28, "No space left on device")))
    assert text == "the file x cannot be read (No space left on device)."


def test_similar_names():
    known = ["MODEL.WEIGHTS", "SOLVER.MAX_ITER", "MODEL.GHM.CLS.BINS", "MODEL.GHM.REG.BINS"]
    assert similar_names("MODEL.WEIGTHS", known) == " (similar: MODEL.WEIGHTS)"
    assert similar_names("BINS", known) == similar_names("zzz", known, ".") == ""
    both = " (similar: MODEL.GHM.CLS.BINS, MODEL.GHM.REG.BINS)"
    assert similar_names("BINS", known, ".") == both
    assert similar_names("a", ["a", "a"]) == ""
    assert similar_names("name\x1b1", ["name\x1b2"]) == " (similar: name\\x1b2)"


def test_a_sentence_cannot_move_the_cursor(capsys):
    with pytest.raises(SystemExit) as stop, exits_with_one_sentence("x"):
        raise UserError("no data set \x1b[2J\ud800\n.")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "x: error: no data set \\x1b[2J\\ud800\\n.\n"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: {}["res9"], "KeyError: res9"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: int("x"), "invalid literal for int() with base 10: 'x'"),
    ],
)
def test_what_cannot_be_built_says_where(make, words):
    line = make.__code__.co_firstlineno
    with pytest.raises(UserError) as stop, building("the model"):
        make()
    where = f"({Path(__file__).as_posix()}, line {line})"
    assert str(stop.value) == f"the model cannot be built: {words} {where}."


def test_sentences_and_the_end_of_a_program_pass():
    for error in (UserError("a sentence."), KeyboardInterrupt(), MemoryError()):
        with pytest.raises(type(error)) as stop, building("the model"):
            raise error
        assert stop.value is error


def test_this_project_s_own_code_is_not_located():
    with pytest.raises(UserError) as stop, building("the loss"):
        GHMCLoss(bins=0)
    assert str(stop.value).startswith("the loss cannot be built: bins must be")
    assert "line" not in str(stop.value)
