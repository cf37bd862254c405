"""Other methods, to compare with the five stages."""
