"""Train from a recipe: python launch/train.py +train=preview_dit or +distill=preview_2step [overrides]; recipes/ has them."""

from start import start

if __name__ == "__main__":
    start("train")
