"""One experiment: a model, a way to adapt it, a trial."""
