"""`python -m experiments.report FOLDER...`, the same as `lightning-prune report`."""

from lightning_prune.study.report import main

if __name__ == "__main__":
    main()
