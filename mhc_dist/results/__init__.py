"""Figures that benches and studies left in results/, as one page with pictures."""
