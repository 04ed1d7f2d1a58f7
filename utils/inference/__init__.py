"""Own images, judged and written down: which files, their results, and a folder that fills up."""
