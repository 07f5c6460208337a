"""Kernels for NVIDIA GPUs, written in Triton: plain functions on torch tensors.

Triton is optional, so nothing is imported here: ask `probe.available()` first, then import the
module with the function you need. Every function takes float16 and bfloat16 (float32 too, for
tests), rounds where transformers' own modules round, launches on the current stream, waits for
nothing and chooses its grid from shapes and host-known bounds only, so all of them may be captured
in a CUDA graph.

`attention/` and the fused stages call them, and choose when.
"""
