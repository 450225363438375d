"""The label store: what teachers said, in files that are whole or absent."""
