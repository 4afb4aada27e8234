"""The paper's claims at a size that a small machine can check."""
