"""Score a model: python launch/evaluate.py +preset=fast_preview eval.clips=20 eval.seed=1 json=out.json."""

from start import start

if __name__ == "__main__":
    start("evaluate")
