"""Checkpoints: written by every rank for itself, committed by one rename, loaded on any topology."""
