"""`python -m ghm_d2 COMMAND`."""

from ghm_d2.cli import main

if __name__ == "__main__":
    main()
