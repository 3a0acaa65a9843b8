"""Put a finished training into a model zoo; --help lists the options."""

from ghm_d2.cli.export_zoo import main

if __name__ == "__main__":
    main()
