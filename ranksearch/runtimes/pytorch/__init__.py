"""PyTorch itself, eager, compiled or as a CUDA graph, on the CPU and on NVIDIA GPUs."""
