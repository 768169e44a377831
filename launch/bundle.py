"""Copy exported weights into the package: python launch/bundle.py source=runs/preview_2step/preview_2step.safetensors."""

from start import start

if __name__ == "__main__":
    start("bundle")
