"""A run reports on itself: losses and measurements go to monitors and the console, a trace to the disk."""
