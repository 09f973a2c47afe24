"""Fits the split form of a model to a text and a budget: statistics, factors, ranks and widths."""
