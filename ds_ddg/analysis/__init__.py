"""What a schedule costs, what to choose, and pictures of planned and recorded runs, without torch."""
