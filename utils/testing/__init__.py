"""Testing: models on a bench, their metrics with intervals, and how they compare."""
