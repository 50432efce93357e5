"""Thin Lightning callbacks over pure functions."""
