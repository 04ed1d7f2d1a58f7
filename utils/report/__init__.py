"""Comparisons and trainings as people read them: tables, pictures, curves and one HTML file."""
