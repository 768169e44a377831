"""Streaming autoencoders between pixels or motion and latents, and the warp that applies motion to a picture."""
