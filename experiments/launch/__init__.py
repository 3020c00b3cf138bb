"""What both executors share before a run starts, and the executor of this machine."""
