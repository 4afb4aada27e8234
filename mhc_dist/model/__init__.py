"""The mathematics of the model on one device."""
