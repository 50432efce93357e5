"""Train, validate, test or predict: `python train.py fit --config configs/experiments/NNN_name.yaml`."""

import time

STARTED = time.perf_counter()  # what the imports take is part of the bill

from frugal.cli.train import main  # noqa: E402

if __name__ == "__main__":
    main(started=STARTED)
