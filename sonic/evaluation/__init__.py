"""Quality evaluation: metrics of a video, evaluation of a model, sweeps over options, and their reports."""
