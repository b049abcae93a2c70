"""What a run says of itself: losses and measurements to monitors and the console, and a trace to disk."""
