"""Data that a program makes: procedural tasks with verifiers, simulated physics, text of a local model."""
