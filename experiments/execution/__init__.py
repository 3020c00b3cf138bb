"""One process executes one run: the attempt, the worker around it, and what the process records of itself."""
