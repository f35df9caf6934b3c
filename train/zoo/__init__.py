"""The CIFAR networks of the distillation literature, in the state-dict layout of their published checkpoints."""
