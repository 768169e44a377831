"""Autoencoders between pixels and latents, as streams, and the warp that lays motion over a picture."""
