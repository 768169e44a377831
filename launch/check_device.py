"""Check the device of this machine in nine minutes: python launch/check_device.py; with device=cpu on small shapes."""

from start import start

if __name__ == "__main__":
    start("check")
