"""Train, resume or evaluate a detector: `python train_net.py --help` lists the options."""

from ghm_d2.engine import main

if __name__ == "__main__":
    main()
