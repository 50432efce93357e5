"""The transformer: imports torch and nothing of ours but this folder."""
