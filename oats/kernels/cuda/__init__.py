"""What is behind the functions of :mod:`oats.kernels` on a CUDA device (docs/cuda.md).

Only packing and unpacking wait for the device. A product does not, so a CUDA graph can capture it.
"""
