"""Time this machine: python launch/bench.py preview (the main job), dit_medium (a forward), fit (a published model) or scaling."""

from start import start

if __name__ == "__main__":
    start("bench")
