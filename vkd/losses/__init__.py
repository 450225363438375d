"""Losses: pure functions of a batch, each a (weighted sum, count) over rows, so that ranks and batches add up."""
