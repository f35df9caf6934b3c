"""Analyses of a cache: statistics of its predictions, tuning of the fusion, fidelity of codecs."""
