"""The command lines: `train.py` (Lightning) and `frugal <verb>`."""
