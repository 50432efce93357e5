"""From raw documents to documents worth training on: filters that give a reason for each drop, and a report."""
