"""A portrait and a recording become a talking video: python launch/infer.py +preset=fast_preview image=me.jpg audio=me.wav"""

from start import start

if __name__ == "__main__":
    start("infer")
