"""Says before a job starts what fits on given hardware, how fast it can be at most, and why."""
