"""The CIFAR networks of the distillation literature, in the state-dict layout of their published checkpoints."""

ZOO_VERSION = (
    1  # raise when a network of the zoo computes something else from the same weights; see pipeline/build/known.py
)
