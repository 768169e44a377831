"""Judge a finished video: python launch/judge.py mp4=out.mp4 image=me.jpg audio=me.wav json=out.json."""

from start import start

if __name__ == "__main__":
    start("judge")
