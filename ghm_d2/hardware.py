"""What a run says about the machine that it ran on."""

import platform
from pathlib import Path

__all__ = ["processor_name"]


def processor_name() -> str:
    """The model name of the first CPU, or what Python knows of it where the system has no list."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
