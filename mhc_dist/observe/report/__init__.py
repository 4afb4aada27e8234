"""The report of a run: one page that tells how it went."""
