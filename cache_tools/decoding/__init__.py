"""Decode pictures in processes of their own, for builds and for training (`service.py`)."""
