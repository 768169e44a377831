"""Files that travel with the package: preview weights and a speech sample, each with its card."""
