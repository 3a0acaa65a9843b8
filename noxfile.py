"""The test suite on the versions that are promised to work: `nox`, or `nox --session oldest`.

Each session downloads a PyTorch of its own (several GB in all). `nox -- ARGS` hands ARGS to pytest.
"""

import re
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True

# As in tools/bootstrap.py, without its dependencies: their bounds are stricter than needed.
DETECTRON2 = "sal-detectron2==0.7.2"
PYTHON_310_WHEEL = ("--only-binary=:all:", "--python-version", "3.10")

# The last versions that accept NumPy 1.
NUMPY_1 = ("numpy<2", "opencv-python<4.12", "ml_dtypes<0.6")


def constraints(session: nox.Session, *others: str) -> str:
    """constraints.txt with these requirements in place of its own."""
    names = {re.split(r"[<>=]", other)[0] for other in others}
    lines = Path("constraints.txt").read_text().splitlines()
    kept = [line for line in lines if line.split("==")[0].lower() not in names]
    file = Path(session.create_tmp(), "constraints.txt")
    file.write_text("\n".join([*kept, *others, ""]))
    return str(file.resolve())


def test(session: nox.Session, limits: str, check: str) -> None:
    """Installs everything within these constraints, checks the versions, runs the tests."""
    session.install("-c", limits, "setuptools", "wheel")
    extras = ".[ablation,detectron2,dev,export,mlflow,tiles,wandb]"
    session.install("--no-build-isolation", "-c", limits, "-e", extras)
    site_packages = session.run(
        "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", silent=True
    )
    target = ("--target", site_packages.strip(), "--upgrade", *PYTHON_310_WHEEL)
    session.install("--no-deps", *target, DETECTRON2)
    session.run("python", "-c", check)
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """PyTorch 2.3.1 and NumPy 1, with Detectron2's compiled part, which was built for these."""
    pins = ("torch==2.3.1", "torchvision==0.18.1", "setuptools<80", *NUMPY_1)
    check = (
        "import numpy, torch, detectron2._C; print(torch.__version__, numpy.__version__);"
        "assert torch.__version__.startswith('2.3.1') and numpy.__version__ < '2'"
    )
    test(session, constraints(session, *pins), check)


@nox.session(python="3.10")
def numpy1(session: nox.Session) -> None:
    """The PyTorch of constraints.txt with NumPy 1."""
    check = "import numpy; assert numpy.__version__ < '2'"
    test(session, constraints(session, *NUMPY_1), check)


@nox.session(python="3.11")
def newest(session: nox.Session) -> None:
    """Everything of constraints.txt, which has NumPy 2."""
    check = "import numpy; assert numpy.__version__ >= '2'"
    test(session, constraints(session), check)
