"""Start mhc_dist anywhere. Nothing in this package imports torch."""
