"""The numbers that we publish, one command each, peers beside us in the same run."""
