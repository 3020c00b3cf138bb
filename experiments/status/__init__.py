"""Where runs stand: their files first, Slurm second; and how that is shown."""
