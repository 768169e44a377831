"""Training: one loop, a table of objectives, and engines that place the parameters on devices."""
