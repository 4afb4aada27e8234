"""How the mathematics is spread out over ranks: partition and expert exchange."""
