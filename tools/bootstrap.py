"""Set up `.venv` from nothing, or bring it up to date; the Makefile calls this before every target.

Standard library only, and syntax that Python 3.6 reads: an old interpreter gets a sentence instead
of a syntax error. `.venv/ghm_d2_setup.json` records what `.venv` holds: a second call that finds
the same record does nothing, and a set-up that was cut off starts again from nothing.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_PYTHON = (3, 10)
# The package index has no official Detectron2. This wheel is upstream main of April 2024 (commit
# a59f0563). Its tag says Python 3.10, but its Python part runs on later versions too.
DETECTRON2_WHEEL = "sal-detectron2==0.7.2"
DETECTRON2_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
DEV = ("pip", "setuptools", "wheel", "pytest", "pluggy", "iniconfig", "hypothesis", "mypy", "ruff")
KEY_FILES = ("constraints.txt", "pyproject.toml", "setup.py", "tools/bootstrap.py")
SITES = '[p for p in sys.path if p.rstrip("/").endswith(("site-packages", "dist-packages"))]'
FIND_DETECTRON2 = (
    "import importlib.util as u, json, sys; s = u.find_spec('detectron2');"
    "print(json.dumps({'found': bool(s and s.origin), 'sites': " + SITES + "}))"
)
# Extras that one target alone needs, and what shows that they are there.
TARGETS = {
    "dist": "import build, twine",
    "docs": "import myst_parser, sphinx, sphinx_rtd_theme",
}
ALL_PRESENT = (
    "import importlib.util as u, sys;"
    "sys.exit(not all(u.find_spec(n) for n in ('torch', 'detectron2', 'ghm_d2')))"
)
IMPORT_ALL = (
    "import platform, torch, torchvision, cv2, pycocotools.mask, detectron2, detectron2.modeling,"
    " ghm_d2; print(f'Python {platform.python_version()}, torch {torch.__version__}, torchvision "
    "{torchvision.__version__}, Detectron2 {detectron2.__version__} in {detectron2.__path__[0]}')"
)


class SetupError(Exception):
    """Set-up cannot go on; the message is one sentence with the way out."""


def python_problem(version: tuple) -> str:
    """Returns what is wrong with this Python version, or an empty string."""
    if tuple(version[:2]) >= MINIMUM_PYTHON:
        return ""
    has, minimum = (".".join(map(str, v[:2])) for v in (version, MINIMUM_PYTHON))
    return (
        f"Python {has} is too old: ghm_d2 needs {minimum} or newer; name one, for example "
        "`make quickstart PYTHON=python3.11`."
    )


def check_sha256(path: Path, expected: str) -> None:
    """Raises SetupError unless the file has this SHA-256 (hexadecimal)."""
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != expected:
        raise SetupError(
            f"{path.name} was not installed: its SHA-256 is {actual}, not {expected}; check where "
            "pip downloads from, or pass your own source: `make setup DETECTRON2=...`."
        )


def stamp_key(root: Path) -> str:
    """Hash of everything that decides what `.venv` holds (the editable install names root)."""
    digest = hashlib.sha256(str(root).encode())
    for name in KEY_FILES:
        digest.update(hashlib.sha256((root / name).read_bytes()).digest())
    return digest.hexdigest()


class Environment:
    """`.venv` and the record of its set-up."""

    def __init__(self, path: Path) -> None:
        self.path, self.python = path, path / "bin" / "python"
        self.pip = [self.python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
        self.own_limits = path / "ghm_d2_constraints.txt"
        self.record_file = path / "ghm_d2_setup.json"
        self.log = path / "ghm_d2_setup.log"

    def record(self) -> dict:
        """What the last set-up wrote; empty for a `.venv` that was made by hand."""
        try:
            return json.loads(self.record_file.read_text())
        except (OSError, ValueError):
            return {}

    def write(self, record: dict) -> None:
        self.record_file.write_text(json.dumps(record, indent=1) + "\n")

    def runs(self, code: str) -> bool:
        try:
            return subprocess.run([self.python, "-c", code], capture_output=True).returncode == 0
        except OSError:
            return False


def needs(record: dict, key: str, requested: str, whole: bool) -> str:
    """Decides what an existing `.venv` needs.

    Args:
        record: its record; empty when it was made by hand.
        key: `stamp_key` of the checkout.
        requested: the Detectron2 that was asked for, "" for the default.
        whole: whether its Python starts and finds what this project needs.

    Returns:
        "nothing", "packages" (install what is missing or has changed) or "rebuild": only of an
        environment that an earlier set-up made, so that nobody's own work is deleted.
    """
    same = record.get("complete") and record.get("requested", "") == requested and whole
    if record.get("created_here") and not same:
        return "rebuild"
    return "nothing" if same and record.get("key") == key else "packages"


def run(step: str, command: list, log: Path) -> None:
    """Runs one step, output in the log; shows the elapsed time and, on failure, the log's end."""
    start = time.monotonic()
    print(f"setup: {step} ...", end="", flush=True)
    with log.open("ab") as out:
        try:
            process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        except OSError as error:
            raise SetupError(f"{command[0]} does not start ({error}): run `make clean`.") from error
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if sys.stdout.isatty():
                    elapsed = time.monotonic() - start
                    print(f"\rsetup: {step} ... {elapsed:.0f} s", end="", flush=True)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    print("" if sys.stdout.isatty() else f" {time.monotonic() - start:.0f} s", flush=True)
    if process.returncode != 0:
        print("\n".join(log.read_text(errors="replace").splitlines()[-15:]))
        raise SetupError(
            f"Set-up stopped while {step}: the reason stands above (the whole output is in "
            f"{log.relative_to(ROOT)}); the same command tries again, `make clean` forgets it all."
        )


def maker(environment: Environment, record: dict) -> dict:
    """The Python that `.venv` is made with: the one running, or its parent if that is `.venv`."""
    if Path(sys.prefix).resolve() != environment.path.resolve():
        version = ".".join(map(str, sys.version_info[:3]))
        return {"executable": sys.executable, "prefix": sys.prefix, "version": version}
    base = getattr(sys, "_base_executable", sys.executable)
    return record.get("made_by") or {"executable": base, "prefix": sys.base_prefix}


def probe(python: str) -> dict:
    """Whether this Python finds Detectron2, and its site-packages folders."""
    # In tools/, so that a clone named detectron2 in the current folder is not taken for a package.
    out = subprocess.run([python, "-c", FIND_DETECTRON2], cwd=ROOT / "tools", capture_output=True)
    return json.loads(out.stdout) if out.returncode == 0 else {"found": False, "sites": []}


def create(environment: Environment, python: str, record: dict) -> None:
    """Makes `.venv`; where Python already has a Detectron2, `.venv` sees that Python's packages."""
    environment.path.mkdir()
    # The record comes first: cut off before it has pip, this `.venv` must still count as ours.
    environment.write(record)
    run(f"making .venv with {python}", [python, "-m", "venv", environment.path], environment.log)
    parent = probe(python)
    if parent["found"] and not record["requested"]:
        site_packages = next((environment.path / "lib").glob("python*/site-packages"))
        # addsitedir also reads the .pth files there, one of which an editable Detectron2 is.
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in parent["sites"]]
        (site_packages / "ghm_d2_parent.pth").write_text("".join(lines))


def installed_versions(environment: Environment) -> str:
    """Constraints that keep every package, except development tools, at its present version."""
    command = [*environment.pip, "list", "--format=freeze"]
    out = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in out.stdout.splitlines() if "==" in line]
    return "\n".join(line for line in lines if line.split("==")[0].lower() not in DEV)


def install_detectron2(environment: Environment, requested: str) -> None:
    # Without dependencies: the wheel's metadata wants numpy<2 and upstream's iopath<0.1.10, and
    # needs neither. pyproject.toml names what Detectron2 really imports.
    options = [*environment.pip, "install", "--no-deps"]
    if requested:
        command = [*options, "--no-build-isolation", "--force-reinstall", requested]
        run(f"installing Detectron2 from {requested}", command, environment.log)
        return
    target = ["--only-binary=:all:", "--python-version", "3.10"]
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = subprocess.check_output([environment.python, "-c", code], text=True).strip()
    with tempfile.TemporaryDirectory() as folder:
        command = [*environment.pip, "download", "--no-deps", *target, "-d", folder]
        command.append(DETECTRON2_WHEEL)
        run(f"downloading {DETECTRON2_WHEEL}", command, environment.log)
        wheel = next(Path(folder).iterdir())
        check_sha256(wheel, DETECTRON2_SHA256)
        command = [*options, *target, "--upgrade", "--target", purelib, str(wheel)]
        run("installing Detectron2 (SHA-256 as expected)", command, environment.log)


def install(environment: Environment, record: dict) -> None:
    """Installs the packages, this project (editable) and, if there is none yet, Detectron2."""
    constraints, extras = ROOT / "constraints.txt", "ablation,detectron2,dev,export,tiles"
    ours = record["requested"] or record["detectron2"] not in ("", "found")
    as_it_is = not ours and probe(str(environment.python))["found"]
    if as_it_is:
        print("setup: Detectron2 is already there: it and its packages stay as they are")
        constraints, extras = environment.own_limits, "ablation,dev,export,tiles"
        constraints.write_text(installed_versions(environment))
    record["detectron2"] = "found" if as_it_is else record["requested"] or DETECTRON2_WHEEL
    environment.write(record)
    command = [*environment.pip, "install", "-c", str(constraints)]
    run("installing setuptools", [*command, "setuptools>=77,<82", "wheel"], environment.log)
    command += ["--no-build-isolation", "-e", f".[{extras}]"]
    size = "" if as_it_is else " (about 5 GB, some minutes)"
    run(f"installing the packages{size}", command, environment.log)
    if not as_it_is:
        install_detectron2(environment, record["requested"])


def install_for(target: str, environment: Environment) -> None:
    """Installs what `make TARGET` needs besides, unless it is there."""
    if environment.runs(TARGETS[target]):
        return
    # Beside a Detectron2 that was found, everything stays at the version it has.
    found = environment.record().get("detectron2") == "found"
    limits = environment.own_limits if found else ROOT / "constraints.txt"
    command = [*environment.pip, "install", "--no-build-isolation", "-c", str(limits)]
    command += ["-e", f".[{target}]"]
    run(f"installing what `make {target}` needs", command, environment.log)


def set_up(requested: str, python_was_chosen: bool) -> None:
    """Brings `.venv` to what this checkout needs.

    Args:
        requested: what `pip install` gets as Detectron2; "" keeps that of the last set-up.
        python_was_chosen: the user named this Python, so that a `.venv` of another is an error.
    """
    start = time.monotonic()
    environment = Environment(ROOT / ".venv")
    record, key = environment.record(), stamp_key(ROOT)
    requested = requested or record.get("requested", "")
    made_by = maker(environment, record)
    before = record.get("made_by", made_by)
    if python_was_chosen and before["prefix"] != made_by["prefix"]:
        raise SetupError(
            f"The .venv here was made by {before['executable']}, not by {made_by['executable']}: "
            "run `make clean` first to change."
        )
    if environment.path.exists():
        todo = needs(record, key, requested, environment.runs(ALL_PRESENT))
        if todo == "nothing":
            return
        if todo == "rebuild":
            print("setup: the last set-up was not finished or has changed: starting over")
            shutil.rmtree(environment.path)
    record = {"detectron2": "", **record, "key": key, "requested": requested, "complete": False}
    if not environment.path.exists():
        record.update(created_here=True, made_by=made_by, detectron2="")
        create(environment, made_by["executable"], record)
    install(environment, record)
    run("importing everything once", [environment.python, "-c", IMPORT_ALL], environment.log)
    environment.write({**record, "complete": True})
    versions = environment.log.read_text(errors="replace").splitlines()[-1]
    print(f"setup: ready after {time.monotonic() - start:.0f} s: {versions}")


def main(arguments: list) -> str:
    """Runs the set-up; returns the sentence to fail with, or an empty string."""
    problem = python_problem(sys.version_info)
    if problem:
        return problem
    parser = argparse.ArgumentParser(description="Set up .venv for ghm_d2, or bring it up to date.")
    parser.add_argument("--detectron2", default="", help="what pip installs as Detectron2")
    parser.add_argument("--python-was-chosen", action="store_true", help="refuse another's .venv")
    parser.add_argument("--target", choices=TARGETS, help="install what `make TARGET` needs too")
    options = parser.parse_args(arguments)
    try:
        set_up(options.detectron2, options.python_was_chosen)
        if options.target:
            install_for(options.target, Environment(ROOT / ".venv"))
    except SetupError as error:
        return str(error)
    except KeyboardInterrupt:
        return "Set-up was interrupted; the same command starts it again."
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) or 0)
