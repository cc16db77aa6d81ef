"""Reading, checking, preprocessing, sampling and generating data."""
