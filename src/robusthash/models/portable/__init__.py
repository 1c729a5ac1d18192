"""Hashers as files that run without this package: ONNX and TorchScript, checked as they are written."""
