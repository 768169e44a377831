"""Published checkpoints as they are downloaded, and the ready form that they are converted into once."""
