"""Train a network on labelled videos. `run` starts a training; each process of it runs `loop`."""
