"""Metrics: pure functions of whole arrays that give plain numbers."""
