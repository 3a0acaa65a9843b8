"""Mistakes of the user: one exception type, and how its sentence shows names and errors."""

import contextlib
import difflib
import shutil
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

USER_ERROR = 2  # exit code, as argparse's
_LONGEST_SENTENCE = 4000
# What code raises for values that it does not know or that do not fit together.
_MISFITS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class UserError(ValueError):
    """A mistake in a command, config or data set; its message is one sentence with the way out."""

    exit_code = USER_ERROR


class NotInstalled(UserError, ImportError):
    """A package that ghm_d2 cannot bring along is missing."""


@contextlib.contextmanager
def explains_missing_detectron2() -> Iterator[None]:
    """Says how Detectron2 is installed where the block cannot import it.

    Raises:
        NotInstalled: there is no Detectron2.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        raise NotInstalled(
            "Detectron2 is not installed: https://detectron2.readthedocs.io/tutorials/install.html "
            "says how; with Python 3.10, pip install sal-detectron2==0.7.2 does it."
        ) from error


def cannot(verb: str, what: object, error: Exception) -> UserError:
    """The error "WHAT cannot be VERB (reason)." for a file that the system refuses.

    Args:
        verb: a participle, such as "read" or "written".
        what: the file, with what it is for where that helps.
        error: an OSError or UnicodeError.
    """
    return UserError(f"{what} cannot be {verb} ({reason(error)}).")


@contextlib.contextmanager
def building(what: str) -> Iterator[None]:
    """Wraps code that builds something from values of a config, to name them where it fails.

    Args:
        what: is built, in the words of the config.

    Raises:
        UserError: the code failed. Unless this project's own code did, whose messages name the
            argument, the sentence says at which line.
    """
    try:
        yield
    except UserError:
        raise
    except _MISFITS as error:
        speaks = isinstance(error, AssertionError | ImportError | TypeError | ValueError)
        text = reason(error) if speaks else described(error)  # a KeyError says "res9" alone
        raise UserError(f"{what} cannot be built: {text}{_line(error)}.") from error


def _line(error: Exception) -> str:
    """ " (PACKAGE/FILE, line N)" of the code that raised an error; "" for this project's."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(frame.filename)
    if Path(__file__).parent in path.parents:
        return ""
    place = path.as_posix().rpartition("/site-packages/")[2]
    return f" ({place}, line {frame.lineno})"


def reason(error: BaseException) -> str:
    """What an error says, on one line, without the path and number that an OSError repeats."""
    if isinstance(error, UnicodeError):
        return "it is not text in UTF-8"
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif isinstance(error, KeyError) and error.args:
        text = str(error.args[0])  # its own text is quoted
    return shown(" ".join(text.split()).rstrip(".") or type(error).__name__)


def described(error: BaseException) -> str:
    """The type of an error and its :func:`reason`, then those of the error that caused it."""
    text = f"{type(error).__name__}: {reason(error)}"
    return f"{text}; {described(error.__cause__)}" if error.__cause__ else text


def shown(text: object, limit: int = 300) -> str:
    """Text from a file as a terminal, log or page may show it.

    A control character could move the cursor or reverse the line, and a lone surrogate cannot be
    encoded: both, and everything else that is not printable, become escapes such as `\\x1b`.

    Args:
        text: anything with a text form.
        limit: in characters; of a longer text, the middle becomes "...".
    """
    text = str(text)
    if len(text) > limit:
        end = limit // 3  # where a path or a message says what it is about
        text = f"{text[: limit - end - 3]}...{text[-end:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def counted(number: int, noun: str) -> str:
    """ "1 class", "4,155 boxes": a number of things for a reader.

    Args:
        number: of them.
        noun: what one is called.
    """
    plural = "" if number == 1 else "es" if noun.endswith(("s", "x")) else "s"
    return f"{number:,} {noun}{plural}"


def similar_names(name: str, known: Iterable[str], separator: str = "") -> str:
    """Known names like this one, as " (similar: A, B)" for a message; empty if there is none.

    Args:
        name: what was given.
        known: what would have been right.
        separator: of the parts of a name. Where no whole name is similar, names with the same last
            part are taken: people remember that part, but not where in the tree it stands.
    """
    known = sorted(set(known) - {name})
    found = difflib.get_close_matches(name, known, n=3)
    if separator and not found:
        last = name.rpartition(separator)[2]
        found = [other for other in known if other.rpartition(separator)[2] == last][:3]
    return f" (similar: {', '.join(map(shown, found))})" if found else ""


def command(name: str) -> str:
    """How the reader of a message runs a command of the `ghm-d2` program.

    A checkout that is not installed has only `python -m ghm_d2`. A user who ran train_net.py is
    told to use it again.
    """
    started = Path(sys.argv[0])
    as_module = started.parts[-2:] == ("ghm_d2", "__main__.py")
    if name == "train" and not as_module and started.stem != "ghm-d2":
        return "train_net.py"
    installed = started.stem == "ghm-d2" or shutil.which("ghm-d2") is not None
    return f"{'ghm-d2' if installed else 'python -m ghm_d2'} {name}"


@contextlib.contextmanager
def exits_with_one_sentence(program: str) -> Iterator[None]:
    """Turns a mistake of the user into one sentence on stderr and its exit code (2).

    Ctrl-C gives one word and exit code 1.

    Args:
        program: name of the script, with which the sentence begins.

    Raises:
        SystemExit: where the block raised a :class:`UserError`, or was interrupted.
    """
    try:
        yield
    except UserError as error:
        # The sentence may quote names from files, and these any character.
        print(f"{program}: error: {shown(error, _LONGEST_SENTENCE)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(1)
