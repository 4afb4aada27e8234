"""The checks that need a GPU, by what they are about; `gpu_check.py` runs them, each in a process of its own.

A check takes a `Plan` and returns an `Outcome`. The tests run them in Triton's interpreter on a small plan,
with what torch has on GPUs only replaced.
"""
