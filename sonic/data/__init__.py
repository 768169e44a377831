"""What enters and leaves the program: portraits, speech, video files and drawn training data."""
