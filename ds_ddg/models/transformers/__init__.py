"""Layer specs of the transformers library's models, cut into layers from the structure that the model itself shows."""
