"""train_net.py for Python configs: `python lazy_train_net.py --help` lists the options."""

from ghm_d2.lazy import main

if __name__ == "__main__":
    main()
