"""Weights as people bring them: files of many kinds, the tensors in them that fit a network, published weights."""
