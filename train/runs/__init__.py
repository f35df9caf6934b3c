"""The folder of a run: its files, metrics, trackers and result."""
