"""The stages of a conversion, each a function of a model and batches."""
