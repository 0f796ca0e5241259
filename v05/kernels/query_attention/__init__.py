"""Attention of many narrow queries over each prompt's token states, fused with the projections around it."""
