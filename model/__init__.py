"""Models: the frozen CLIP, AA-CLIP's adapters, and the two cross-attentions."""
