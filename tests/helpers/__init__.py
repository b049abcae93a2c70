"""What test modules share; ranks import it by name, as they do test modules."""
