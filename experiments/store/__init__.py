"""Every byte on disk: the records of runs, attempts, launches and evaluations, and who may write them."""
