"""Pictures and figures of a data set, before any training; --help lists the options."""

from ghm_d2.data.look import main

if __name__ == "__main__":
    main()
