"""The Slurm executor: batches, job arrays, what runs inside a job, and the site's limits."""
