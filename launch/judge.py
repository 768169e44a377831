"""Judge a finished film: python launch/judge.py film=out.mp4 image=me.jpg audio=me.wav json=out.json."""

from start import start

if __name__ == "__main__":
    start("judge")
