"""An interpreter for the PTX that Triton emits for the kernels: one thread block at a time, strict about memory.

Section numbers are those of NVIDIA's "Parallel Thread Execution ISA" by name, because the numbers move between versions.
"""
