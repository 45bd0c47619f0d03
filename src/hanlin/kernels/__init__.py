"""Own C++ operations for the CPU, each beside a plain-torch twin that says what it computes.

    library    the compiled code: built on first use, kept in the user's cache folder
    linear     x W^T + b over packed weights
    rows       RMS norm, rotary turn, SwiGLU
    attention  one new token a sequence over the cache

They compute fp32 and bf16 without gradients. An operation returns None where it cannot be used (another dtype or
device, no compiler, `HANLIN_KERNELS=off`), and its caller goes on with torch. Sums run in fp32, and a row's result
depends on nothing but the row: not on the other rows of the batch, nor on the threads.
"""
