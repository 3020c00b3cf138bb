"""What every process needs: rank, random streams, disk and errors; no model and no configuration."""
