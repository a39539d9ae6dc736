"""The C++ and CUDA kernels as torch operators."""
