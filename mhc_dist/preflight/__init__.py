"""Look at hosts and links before a run is started on them."""
