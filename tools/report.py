"""One HTML page about a finished or running training; --help lists the options."""

from ghm_d2.cli.report import main

if __name__ == "__main__":
    main()
