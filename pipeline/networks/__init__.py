"""Teachers and CLIPs: find, load and run them."""
