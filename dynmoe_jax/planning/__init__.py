"""Plans for hardware that is not there, read from what the compiler made of a program."""
