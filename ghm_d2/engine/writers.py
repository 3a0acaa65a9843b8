"""Where the figures of a training go besides the terminal, metrics.json and TensorBoard."""

import importlib.util
import math
import os
import re
from abc import abstractmethod
from pathlib import Path

from detectron2.utils.events import EventWriter, get_event_storage

from ghm_d2.errors import UserError, described

from .settings import Config, as_text, key_of, read_settings

_PROJECT = "ghm_d2"


class _FigureWriter(EventWriter):
    """Hands every figure on once, smoothed as Detectron2's writers smooth it."""

    def __init__(self, window_size: int = 20) -> None:
        """
        Args:
            window_size: number of iterations whose median smooths a noisy figure.
        """
        self._window_size = window_size
        self._last_write = -1

    def write(self) -> None:
        """Detectron2 calls it after some iterations."""
        figures: dict[int, dict[str, float]] = {}
        latest = get_event_storage().latest_with_smoothing_hint(self._window_size)
        for name, (value, iteration) in latest.items():
            if iteration > self._last_write and math.isfinite(value):
                figures.setdefault(iteration, {})[name] = value
        for iteration in sorted(figures):
            self._send(iteration, figures[iteration])
        self._last_write = max(figures, default=self._last_write)

    @abstractmethod
    def _send(self, iteration: int, figures: dict[str, float]) -> None: ...


class WandbWriter(_FigureWriter):
    """Writes a run of Weights & Biases; its variables, such as WANDB_MODE, have their meaning.

    A resumed training is a run of its own in the same group.
    """

    def __init__(self, folder: str, config: str) -> None:
        """
        Args:
            folder: OUTPUT_DIR, whose name names the group.
            config: the whole config, as text.
        """
        import wandb

        super().__init__()
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            group=Path(folder).resolve().name,
            dir=folder,
            config={"config": config},
        )

    def _send(self, iteration: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=iteration)

    def close(self) -> None:
        """Ends the run, which sends what is left."""
        self._run.finish()


class MLflowWriter(_FigureWriter):
    """Writes a run of MLflow, where MLFLOW_TRACKING_URI says, or else into OUTPUT_DIR/mlruns.

    A resumed training is a run of its own with the same name.
    """

    def __init__(self, folder: str, config: str) -> None:
        """
        Args:
            folder: OUTPUT_DIR, whose name names the run.
            config: the whole config, as text; it becomes the artifact config.yaml.
        """
        import mlflow

        super().__init__()
        if "MLFLOW_TRACKING_URI" not in os.environ:
            # By default MLflow uses a database, whose driver mlflow-skinny lacks. It refuses a file
            # store, which gets no more features, without this variable.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri((Path(folder).resolve() / "mlruns").as_uri())
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            mlflow.set_experiment(_PROJECT)
        self._run = mlflow.start_run(run_name=Path(folder).resolve().name)
        mlflow.log_text(config, "config.yaml")

    def _send(self, iteration: int, figures: dict[str, float]) -> None:
        import mlflow

        # MLflow refuses some characters that class names may contain.
        figures = {re.sub(r"[^\w\-. /]", "_", k, flags=re.ASCII): v for k, v in figures.items()}
        mlflow.log_metrics(figures, step=iteration)

    def close(self) -> None:
        """Ends the run."""
        import mlflow

        mlflow.end_run()


WRITERS = {"wandb": WandbWriter, "mlflow": MLflowWriter}
_WAYS_OUT = {"wandb": "log in, set WANDB_MODE=offline", "mlflow": "correct MLFLOW_TRACKING_URI"}


def check_writers(cfg: Config) -> None:
    """Checks that the named writers are known and their packages installed.

    Raises:
        UserError: a name is unknown, or its package not installed.
    """
    for name in read_settings(cfg).writers:
        if name not in WRITERS:
            raise UserError(
                f"{key_of(cfg, 'writers')} may hold {' and '.join(WRITERS)}, got {name!r}."
            )
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"{key_of(cfg, 'writers')} holds {name}, which is not installed: run pip install "
                f"'ghm_d2[{name}]', or leave it out."
            )


def build_more_writers(cfg: Config) -> list[EventWriter]:
    """The writers that the config names, for the main process.

    Raises:
        UserError: a writer cannot start, for example without a login.
    """
    settings, writers = read_settings(cfg), []
    for name in settings.writers:
        try:
            writers.append(WRITERS[name](settings.output_dir, as_text(cfg)))
        except Exception as error:  # network, login and server errors have types of their own
            raise UserError(
                f"{name} cannot start ({described(error)}): "
                f"{_WAYS_OUT[name]}, or leave it out of {key_of(cfg, 'writers')}."
            ) from error
    return writers
