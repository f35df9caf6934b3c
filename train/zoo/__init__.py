"""The CIFAR networks of the distillation literature, in the state-dict layout of their published checkpoints."""

# Increase this when a network computes something else from the same weights: builds then check their caches again
# (pipeline/build/known.py).
ZOO_VERSION = 1
