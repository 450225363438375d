"""Distil large frozen video models into small students on unlabelled video, on Ray."""
