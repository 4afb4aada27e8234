"""Optimizer engine (DeepSpeed) and learning-rate schedule."""
