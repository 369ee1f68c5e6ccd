"""fastbp's GPU kernels, executed from their real PTX (tests/ptxsim) against plain PyTorch in float64."""
