"""Run a trained detector on images and videos; --help lists the options."""

from ghm_d2.deploy.predict_command import main

if __name__ == "__main__":
    main()
