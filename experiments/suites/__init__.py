"""What to run: suites, their rows, scales and datasets, resolved to configurations and run ids."""
