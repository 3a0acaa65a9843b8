"""Run an ablation table over several seeds: `python tools/ablate.py --help` lists the options."""

from ghm_d2.cli.ablate import main

if __name__ == "__main__":
    main()
