"""Draw the GHM paper's figures of a trained detector: `--help` lists the options."""

import sys

from ghm_d2.analysis.report import plot_gradients
from ghm_d2.errors import UserError

if __name__ == "__main__":
    try:
        written = plot_gradients(sys.argv[1:])
    except UserError as error:
        print(f"plot_gradients.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print("Written:", *written, sep="\n  ")
