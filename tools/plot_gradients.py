"""Draw the GHM paper's figures of a trained detector: `--help` lists the options."""

import sys

from ghm_d2.analysis.report import plot_gradients
from ghm_d2.errors import exits_with_one_sentence

if __name__ == "__main__":
    with exits_with_one_sentence("plot_gradients.py"):
        written = plot_gradients(sys.argv[1:])
    print("Written:", *written, sep="\n  ")
