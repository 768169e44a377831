"""A grid of options trained, evaluated or planned: python launch/ablate.py +ablate=steps, or grid.sampler.sample_steps=2,3,4"""

from start import start

if __name__ == "__main__":
    start("ablate")
