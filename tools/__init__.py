"""What is useful beside the five stages; each has --help."""
