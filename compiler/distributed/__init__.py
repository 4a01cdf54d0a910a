"""A Plan applied to torch modules."""
