"""Running Python that nobody has read: what it can reach is its own memory, its own time and one folder."""
