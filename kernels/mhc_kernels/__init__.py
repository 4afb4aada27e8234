"""Fused hyper-connection kernels: references, Triton kernels, and the reports that prove them."""
