"""Trained models, written as ONNX files that need no PyTorch."""
