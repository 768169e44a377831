"""The mathematics of flow matching: tensors in, tensors out, no models."""
