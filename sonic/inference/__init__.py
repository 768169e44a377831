"""Generates talking videos: reads the inputs, encodes the conditions, samples latents, decodes them and writes the video."""
