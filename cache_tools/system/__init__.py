"""The machine that we run on: devices, memory, processes, the warnings of other libraries."""
