"""What a run will cost on a cluster, before anything is rented. Imports no torch."""
