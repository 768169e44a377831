"""Published checkpoints become ready ones, once: python launch/convert.py source=Wan2.2-S2V-14B live_avatar=LiveAvatar output=FOLDER"""

from start import start

if __name__ == "__main__":
    start("convert")
