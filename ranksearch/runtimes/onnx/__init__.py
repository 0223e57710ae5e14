"""ONNX Runtime: what opens and runs models, without torch; what converts them; and what its int8 kernels do."""
