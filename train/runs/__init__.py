"""The folder of a run: files, metrics, trackers, results."""
