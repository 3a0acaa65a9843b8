"""Test sets without ground truth: where the predictions lie, and where to send them."""

import logging
from typing import Any

from ghm_d2.run_folder import RunFolder

from .settings import Settings

logger = logging.getLogger(__name__)

_TEST_DEV = (
    "For COCO's evaluation server, name it detections_test-dev2017_NAME_results.json, zip it, and "
    "follow https://cocodataset.org/#upload. Early in 2026 that server (CodaLab competition 7384) "
    "took no submissions; https://github.com/cocodataset/cocoapi/issues/691 follows its move."
)


def report_submissions(settings: Settings, results: dict[str, Any]) -> bool:
    """Say for each test set that gave no result where its predictions lie and where they go.

    Args:
        settings: of the evaluation.
        results: what `GHMTrainer.test` returned.

    Returns:
        Whether there was such a test set.
    """
    names = settings.test
    by_name = {names[0]: results} if len(names) == 1 else results
    unlabelled = [name for name in names if not by_name[name]]
    for name in unlabelled:
        file = RunFolder(settings.output_dir).predictions(name, names)
        if not file.is_file():
            continue  # not COCO format, or no image: the evaluator has said so
        print(f"{name} has no ground truth here; its predictions are in {file}")
        if name == "coco_2017_test-dev":
            print(_TEST_DEV)
    return bool(unlabelled)
