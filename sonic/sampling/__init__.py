"""Flow matching without models: the path between noise and data, noise schedules, samplers, and guidance, as functions of tensors."""
