"""What fits on which hardware, how fast it can be, and why: python launch/plan.py model=live_avatar_14b hardware=4x24gb"""

from start import start

if __name__ == "__main__":
    start("plan")
