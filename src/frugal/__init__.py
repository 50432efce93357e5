"""Train a Mixture-of-Experts transformer for less, and know what each technique really saved."""
