"""Data: classes and prompts, records of AA-CLIP's JSON lines, images with their masks."""
