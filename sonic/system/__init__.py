"""The process and its machine: run folder, files and their names, standard streams, caches, heartbeats, worker processes."""
