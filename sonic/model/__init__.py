"""The networks: modules for a single device, without any code for several ranks."""
