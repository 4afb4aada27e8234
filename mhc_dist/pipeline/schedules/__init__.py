"""Coarse schedules as pure functions of (ranks, microbatches); standard library only."""
