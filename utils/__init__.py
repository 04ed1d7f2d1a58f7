"""What the scripts share, and three wings that build on it: training, testing and report."""
