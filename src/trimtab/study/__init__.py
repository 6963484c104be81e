"""Many experiments: comparison, search, ablations, and what they report."""
