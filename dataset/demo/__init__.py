"""Rendered products for trying, teaching and testing: 24 categories, eight kinds of defect, pixel masks."""
