"""Planner: predicts, before a job starts, which plans fit on given hardware, the least time they take, and why."""
