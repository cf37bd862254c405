"""The course: a lecture, labs with blanks to fill, and the command that checks them."""
