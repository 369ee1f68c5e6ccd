"""What the Triton kernels are composed of: primitives, written by hand, and activations, rendered from the table."""
