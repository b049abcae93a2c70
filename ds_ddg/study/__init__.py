"""What delay does to a training, in one process and in any loop."""
