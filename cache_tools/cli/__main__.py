"""`python -m cache_tools.cli` is `cache-tools`."""

from cache_tools.cli import main

main()
