"""Corpus, token files and batches."""
