"""The weights of one stage: which ones a micro-batch saw, how they are updated, who shares them."""
