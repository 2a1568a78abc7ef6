"""What the memory of a model knows: which slots are read, when, and what is lost without them."""
