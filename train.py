"""Train, validate, test or predict: `python train.py fit --config configs/experiments/NNN_name.yaml`."""

from frugal.cli.train import main

if __name__ == "__main__":
    main()
