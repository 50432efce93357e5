"""Augmentation: each transform is a deterministic function of (sample, seed, index); training only."""
