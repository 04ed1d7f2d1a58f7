"""Our models in other programs, whose packages are needed there alone."""
