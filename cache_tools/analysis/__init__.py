"""What the teachers of a cache say: statistics, fusion tuning, codec fidelity."""
