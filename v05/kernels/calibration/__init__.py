"""Calibrated fusion: how far a prior can be trusted is learnt from the batch."""
