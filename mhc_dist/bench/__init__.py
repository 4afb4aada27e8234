"""Measurements of whole steps: variants alternate within one run, results go to files."""
