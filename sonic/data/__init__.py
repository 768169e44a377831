"""Input and output of media (pictures, recordings, videos), and the data sets of clips that training reads."""
