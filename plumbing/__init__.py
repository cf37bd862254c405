"""What the five stages share and a student need not read. Nothing in here knows a stage."""
