"""Encoders of the conditions: speech features and text features."""
