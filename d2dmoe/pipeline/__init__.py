"""The order of the stages, the folders they work in, and what is checked between them."""
