"""Encoders: networks that were made to classify, as the first half of networks that segment."""
