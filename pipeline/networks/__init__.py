"""Teachers and CLIPs: find, load and run them."""

# Raise when a network or prompt is identified, loaded or run differently; see pipeline/build/known.py.
NETWORKS_VERSION = 2
