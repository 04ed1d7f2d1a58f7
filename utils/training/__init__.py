"""Training: what a run will do, its images, its steps and its log."""
