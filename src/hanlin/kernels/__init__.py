"""Own C++ operations for the CPU, each beside a plain-torch twin that says what it computes.

    library          the compiled code: built on first use, kept in the user's cache folder

    generating, without gradients, on threads of its own
    linear           x W^T + b over packed weights
    rows             RMS norm, rotary turn, SwiGLU
    paged_attention  a flat batch over the pages of the engine's cache

    training, forward and backward, on torch's threads
    training         RMS norm, rotary turn, SwiGLU, gradients that are added up
    train_attention  whole sequences
    cross_entropy    of rows of logits, and its slope

They compute fp32 and bf16. An operation returns None where it cannot be used (another dtype or device, a graph that is
being traced, no compiler, `HANLIN_KERNELS=off`), and its caller goes on with torch. Sums run in fp32, and a row's
result depends on nothing but the row: not on the other rows of the batch, nor on the threads.
"""
