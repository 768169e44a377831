"""The process and its machine: run folder, files and their names, standard streams, caches of packages, heartbeats, worker processes."""
